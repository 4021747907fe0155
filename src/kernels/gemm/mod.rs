//! Matrix products: bf16 operands, f32 sums, and what is done to a result while it is still in registers.
//!
//! [`Gemm`] describes a product and [`Epilogue`] what becomes of it; [`Gemm::plan`] chooses tile and slices,
//! [`Epilogue::workspace_bytes`] tells what memory they need, [`Gemm::launch`] verifies and queues. [`raw`]
//! queues without verifying.
//!
//! | in a linear layer | layout | epilogue |
//! |---|---|---|
//! | `y = x wᵀ + b`, with GELU or residual | [`Layout::Nt`] | [`Store`] |
//! | `dx = dy w` | [`Layout::Nn`] | [`Store`] |
//! | `dh = (dy w) · gelu'(h)`, `db` | [`Layout::Nn`] | [`GeluGrad`] |
//! | `dw += dyᵀ x` | [`Layout::Tn`] | [`Sum`] |
//! | `db += Σ dy` | | [`BiasGrad`] |
//!
//! [`sharded`] has products whose rows come from other ranks, or go to them, while they are computed.
//!
//! ```no_run
//! use half::bf16;
//! use trencadis::device::Device;
//! use trencadis::kernels::gemm::{Epilogue, Gemm, Layout, Matrix, Shape, Store, Vector};
//!
//! let device = Device::cuda(0)?;
//! let stream = device.stream()?;
//! let [m, n, k] = [4096, 3072, 768];
//! let (x, w) = (device.zeros::<bf16>(m * k)?, device.zeros::<bf16>(n * k)?);
//! let (y, bias) = (device.alloc::<bf16>(m * n)?, device.zeros::<f32>(n)?);
//! let gemm = Gemm {
//!     shape: Shape { layout: Layout::Nt, m, n, k },
//!     a: Matrix::of(&x, 0, k),
//!     b: Matrix::of(&w, 0, k),
//!     live: Vector::none(),
//!     dependent: false,
//! };
//! let mut store = Store::plain(Matrix::of(&y, 0, n));
//! store.bias = Vector::from(&bias);
//! let epilogue = Epilogue::Store(store);
//! let plan = gemm.plan(&epilogue, device.info())?;
//! gemm.launch(&stream, &epilogue, &plan, &Vector::none())?; // No workspace: nothing is reduced.
//! # Ok::<(), trencadis::Error>(())
//! ```

pub mod raw;
pub mod sharded;

mod bias_grad;
mod checked;
mod heuristics;
mod hopper;
mod memory;

pub use super::registry::gemm as tiles;

pub use bias_grad::BiasGrad;
pub(in crate::kernels) use checked::gelu_code;
pub use checked::{Epilogue, GeluGrad, Gemm, Store, Sum};
pub use heuristics::{Finish, Plan, Shape, plan, plans};
pub use memory::{Matrix, Vector};
pub use tiles::{HOPPER_TILES, Kind, Layout, SHARDED_TILES, Scheme, TILES, Tile};
