//! The GPU kernels: one file a family, from the unsafe raw launch to the checked one.
//!
//! A *raw* launch takes [`Kernels`](crate::device::Kernels), a [`RawStream`](crate::device::RawStream) and a struct of
//! [`Ptr`](crate::device::Ptr)s and sizes, such as [`elementwise::launch_add`]: nothing is verified. A *checked* launch
//! takes a [`Stream`](crate::device::Stream) and [`Buffer`](crate::device::Buffer)s and verifies sizes, strides, alignment
//! and what the device can do before anything is queued, such as [`attention::Attention::forward`]. Both allocate no
//! device memory, copy nothing and never wait; both can be captured; workspaces are the caller's, and their sizes are told
//! beforehand. A kernel's code is loaded by its first launch, or by
//! [`Kernels::preload`](crate::device::Kernels::preload), which a capture may need.
//!
//! Another engine keeps its context, stream and memory: raw launches take the handles as they are, checked ones what is lent
//! to [`Device::current`](crate::device::Device::current).
//!
//! ```no_run
//! use half::bf16;
//! use trencadis::device::{Buffer, Device, Ptr, RawStream};
//! use trencadis::kernels::elementwise::{Add, Addend};
//!
//! /// Queues `x[rows, width] += row[width]` on a `CUstream`, for an engine whose context is current.
//! ///
//! /// # Safety
//! /// `stream` is one of that context, and the addresses are memory of it, until the stream has come so far.
//! unsafe fn add_row(device: &Device, stream: *mut std::ffi::c_void, x: u64, row: u64, rows: usize, width: usize)
//!     -> trencadis::Result<()>
//! {
//!     let stream = unsafe { device.borrow_stream(RawStream(stream))? };
//!     let x = unsafe { Buffer::<bf16>::from_raw(device, Ptr::from_raw(x), rows * width)? };
//!     let row = unsafe { Buffer::<f32>::from_raw(device, Ptr::from_raw(row), width)? };
//!     Add { rows, width }.launch(&stream, None, &x, Addend::Row(&row), None)
//! }
//!
//! // Once, where the engine's context is current: kernels are loaded for each device anew.
//! let device = Device::current()?;
//! # Ok::<(), trencadis::Error>(())
//! ```
//!
//! | module | kernels |
//! |---|---|
//! | [`attention`] | packed attention in bf16 and f16 with QK-norm, rotary positions, shared heads, both passes; windows |
//! | [`gemm`] | products with what comes before and after them |
//! | [`norm`], [`residual`] | LayerNorm and RMSNorm, residual branches, LayerScale, stochastic depth |
//! | [`view`], [`patch`], [`position`], [`pool`] | into and out of the sequence: pictures, pixels, positions, pooling |
//! | [`loss`], [`contrastive`], [`optim`] | cross-entropy; losses of images and texts; AdamW, LAMB, SGD, Adafactor |
//! | [`elementwise`], [`collective`], [`measure`] | sums and GELU, sums over ranks, what a device can do at most |
//!
//! [`matrix`] is the table of element types, sizes, GPUs and tolerances.

pub mod attention;
pub mod collective;
pub mod contrastive;
mod element;
pub mod elementwise;
pub mod gemm;
pub mod loss;
pub mod matrix;
pub mod measure;
pub mod norm;
mod operand;
pub mod optim;
pub mod patch;
pub mod pool;
pub mod position;
pub mod registry;
pub mod residual;
pub mod tolerance;
pub mod view;

pub use element::Element;
pub use operand::Rows;
#[cfg(feature = "train")]
pub(crate) use operand::check_cu_seqlens;
