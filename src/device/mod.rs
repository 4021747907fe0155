//! Devices behind one interface: memory, streams, events, graphs and kernels of an NVIDIA GPU, or of the
//! emulator that runs the same kernels on the host (feature `emulator`, for tests). [`Device::planned`] only counts
//! memory.
//!
//! A [`Device`] gives [`Buffer`]s, [`Stream`]s and loaded [`Kernels`]. The driver is looked for when a
//! device is made and never linked, so a program that is built with all this runs where there is none.
//! Engines that have a context, streams and memory of their own keep them: raw launches take a [`RawStream`] and
//! [`Ptr`]s alone, of [`Kernels::for_current_context`]; checked ones take what is lent to [`Device::current`] with
//! [`Device::borrow_stream`] and [`Buffer::from_raw`].

#[cfg(feature = "emulator")]
pub mod emulator;
pub mod fatbins;

mod backend;
#[cfg(feature = "train")]
mod choice;
mod cuda;
#[cfg(feature = "cust")]
mod cust;
#[cfg(feature = "emulator")]
mod emulated;
mod fault;
mod handle;
mod info;
mod kernels;
mod launch;
mod memory;
#[cfg(feature = "train")]
pub(crate) mod nccl;
mod pinned;
mod planned;
#[cfg(feature = "train")]
mod report;
mod stream;
mod tensor_map;
mod words;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

#[cfg(feature = "train")]
pub use choice::{DeviceChoice, Selected, select, select_for_rank, select_for_ranks};
pub use fault::Fault;
pub use handle::{Ptr, RawStream};
pub use info::{DeviceInfo, Driver};
pub use kernels::Kernels;
pub use launch::Launch;
pub use memory::Buffer;
pub use pinned::Pinned;
#[cfg(feature = "train")]
pub use report::report;
pub use stream::{Event, Graph, Stream};
pub use tensor_map::{TensorBoxes, TensorElement, TensorMap, TensorSwizzle};

use crate::Result;
use backend::Backend;
use fault::Faults;

/// A device with its memory and its kernels; clones are the same device.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
    count: Arc<Count>,
}

/// Bytes of live buffers.
#[derive(Default)]
struct Count {
    bytes: AtomicUsize,
    /// What they belong to as well.
    outer: Option<Arc<Count>>,
}

struct Inner {
    // Dropped in this order: kernels are unloaded while the memory still holds the context.
    kernels: Kernels,
    backend: Box<dyn Backend>,
    faults: Faults,
}

impl Device {
    fn new(kernels: Kernels, backend: Box<dyn Backend>) -> Self {
        let inner = Inner { kernels, backend, faults: Faults::default() };
        Self { inner: Arc::new(inner), count: Arc::default() }
    }

    /// GPU number `ordinal` of those that the driver shows (`CUDA_VISIBLE_DEVICES` chooses among them).
    ///
    /// # Errors
    /// One sentence that says what is missing: no driver, one that is too old, no such GPU, a GPU older
    /// than Ampere, or no kernels for it in this build.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        let (kernels, backend) = cuda::open(ordinal)?;
        Ok(Self::new(kernels, backend))
    }

    /// The CUDA context that is current on this thread, which another engine has made and keeps: a device whose launches
    /// go to that engine's streams ([`borrow_stream`](Self::borrow_stream)) and memory
    /// ([`Buffer::from_raw`]). The context is neither retained nor changed; a stream, and memory of the pool that the
    /// driver has for the GPU, are only taken when something is allocated here.
    ///
    /// Make it once and keep it: kernels are loaded for each anew. Drop it, and all that was made of it, before
    /// the context is destroyed. A launch makes the context current on its thread where another or none is.
    ///
    /// # Errors
    /// No current context, or any reason for which [`cuda`](Self::cuda) fails.
    pub fn current() -> Result<Self> {
        let (kernels, backend) = cuda::current()?;
        Ok(Self::new(kernels, backend))
    }

    /// A device that runs the kernels on the host, on the thread that launches them.
    #[cfg(feature = "emulator")]
    pub fn emulator(options: emulator::EmulatorOptions) -> Self {
        let (info, dependent) = (emulated::describe(&options), options.dependent);
        let host = emulated::Host::new(options);
        let kernels = Kernels::new(Box::new(host.clone()), info).with_dependent(dependent);
        Self::new(kernels, Box::new(host))
    }

    /// The same device, whose [`allocated_bytes`](Self::allocated_bytes) are those of buffers that are made through
    /// this handle and its clones: what one user of a device takes, whatever others do meanwhile.
    pub fn counted_apart(&self) -> Self {
        let count = Count { bytes: AtomicUsize::new(0), outer: Some(self.count.clone()) };
        Self { count: Arc::new(count), inner: self.inner.clone() }
    }

    /// Number of GPUs that the driver shows: at least one.
    ///
    /// # Errors
    /// No driver, one that is too old, or no GPU.
    pub fn cuda_count() -> Result<usize> {
        cuda::count()
    }

    /// What tells a GPU from all others, on every machine; none where the device is no GPU.
    ///
    /// # Errors
    /// The driver does not tell it.
    pub fn uuid(&self) -> Result<Option<[u8; 16]>> {
        self.backend().uuid()
    }

    /// A number that is the same for this device and its clones alone, within this process.
    #[cfg(feature = "train")]
    pub(crate) fn identity(&self) -> u64 {
        Arc::as_ptr(&self.inner).addr() as u64
    }

    /// Whether `other` is this very device, with the same memory and streams.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        self.kernels().info()
    }

    /// Its kernels.
    pub fn kernels(&self) -> &Kernels {
        &self.inner.kernels
    }

    fn faults(&self) -> &Faults {
        &self.inner.faults
    }

    /// The counts that a buffer made through this handle belongs to, that of all buffers last.
    fn counts(&self) -> impl Iterator<Item = &AtomicUsize> {
        std::iter::successors(Some(&*self.count), |count| count.outer.as_deref()).map(|count| &count.bytes)
    }

    fn backend(&self) -> &dyn Backend {
        self.inner.backend.as_ref()
    }
}
