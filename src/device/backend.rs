//! What a device has to be able to do: implemented by a GPU and by the emulator.

use std::any::Any;
use std::ffi::c_void;

use super::{Launch, RawStream, TensorBoxes, TensorMap};
use crate::{Error, Result};

/// Memory and streams.
pub(super) trait Backend: Send + Sync {
    /// Makes the device the one that libraries of CUDA use on this thread.
    #[cfg(feature = "train")]
    fn bind(&self) -> Result<()> {
        Ok(())
    }

    /// What tells a GPU from all others, on every machine; none where it is no GPU.
    fn uuid(&self) -> Result<Option<[u8; 16]>> {
        Ok(None)
    }

    /// Memory of `bytes` bytes, more than none.
    fn alloc(&self, bytes: usize) -> Result<u64>;

    /// Frees memory after everything that is queued, the captures under way, and the graphs that may use it.
    ///
    /// # Safety
    /// `address` comes from [`alloc`](Self::alloc) and is not used again.
    unsafe fn free(&self, address: u64);

    /// Verifies that memory of somebody else is memory of this device, and takes it for such until it is
    /// [given back](Self::give_back).
    ///
    /// # Safety
    /// The bytes stay there until then.
    unsafe fn lend(&self, address: u64, bytes: usize) -> Result<()>;

    /// Ends what [`lend`](Self::lend) began, once for each.
    fn give_back(&self, _address: u64, _bytes: usize) {}

    /// Bytes that could still be allocated, as the driver counts them; none where only the buffers of this device
    /// take memory.
    fn free_bytes(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Writes zeros and waits until they are there.
    ///
    /// # Safety
    /// The range lies in an allocation, which nothing else uses at this moment.
    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()>;

    /// Copies from `host` and waits until that has happened.
    ///
    /// # Safety
    /// As for [`zero`](Self::zero).
    unsafe fn upload(&self, address: u64, host: &[u8]) -> Result<()>;

    /// Copies to `host` once everything that is queued has run.
    ///
    /// # Safety
    /// The range lies in an allocation.
    unsafe fn download(&self, host: &mut [u8], address: u64) -> Result<()>;

    /// Queues a copy from `host`.
    ///
    /// # Safety
    /// The range lies in an allocation; `host`, if it is pinned, is left alone until the copy has run.
    unsafe fn copy_in(&self, stream: RawStream, address: u64, host: &[u8]) -> Result<()>;

    /// Queues a copy to `host`.
    ///
    /// # Safety
    /// The range lies in an allocation; `host` is pinned and left alone until the copy has run.
    unsafe fn copy_out(&self, stream: RawStream, host: &mut [u8], address: u64) -> Result<()>;

    /// Queues a copy within the memory of the device.
    ///
    /// # Safety
    /// Both ranges lie in allocations and have nothing in common.
    unsafe fn copy(&self, stream: RawStream, to: u64, from: u64, bytes: usize) -> Result<()>;

    /// Pinned host memory, all bytes 0.
    fn pinned(&self, bytes: usize) -> Result<Box<dyn HostMemory>>;

    /// A new stream.
    fn stream(&self) -> Result<Box<dyn Stream>>;

    /// A stream of somebody else, which stays theirs.
    ///
    /// # Safety
    /// It lives as long as what is returned.
    unsafe fn borrow_stream(&self, raw: RawStream) -> Result<Box<dyn Stream>>;
}

/// Host memory that the device reaches by itself. Aligned for every element.
pub(super) trait HostMemory: Send + Sync {
    fn bytes(&self) -> &[u8];
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// See [`super::Stream`].
pub(super) trait Stream: Send + Sync {
    fn raw(&self) -> RawStream;
    fn synchronize(&self) -> Result<()>;

    /// Queues the writing of a word.
    ///
    /// # Safety
    /// The word lies in an allocation, aligned to 4 bytes; here and below.
    unsafe fn write_value(&self, word: u64, value: i32) -> Result<()>;

    /// Queues a wait until the word is at least `value`.
    ///
    /// # Safety
    /// As for [`write_value`](Self::write_value).
    unsafe fn wait_value(&self, word: u64, value: i32) -> Result<()>;

    fn record(&self) -> Result<Box<dyn Event>>;
    fn wait(&self, event: &dyn Event) -> Result<()>;
    fn begin_capture(&self) -> Result<()>;
    fn is_capturing(&self) -> Result<bool>;
    fn end_capture(&self) -> Result<Box<dyn Graph>>;
}

/// See [`super::Event`].
pub(super) trait Event: Any + Send + Sync {
    fn synchronize(&self) -> Result<()>;
    fn elapsed_ms(&self, end: &dyn Event) -> Result<f32>;
}

/// See [`super::Graph`].
pub(super) trait Graph: Send {
    /// Queues the graph on a live stream of the device that it was recorded on.
    fn launch(&self, stream: RawStream) -> Result<()>;

    /// Launches, copies and whatever else was recorded.
    fn operations(&self) -> Result<usize>;
}

/// Kernels by name.
pub(super) trait Loaded: Send + Sync {
    /// # Safety
    /// As for [`super::Kernels::launch`], with `bytes` bytes of parameters at `params`.
    unsafe fn launch(
        &self,
        name: &str,
        launch: Launch,
        stream: RawStream,
        params: *const c_void,
        bytes: usize,
    ) -> Result<()>;

    /// Makes a kernel ready, so that its first launch loads nothing.
    fn preload(&self, _name: &str) -> Result<()> {
        Ok(())
    }

    /// The tensor map of boxes that were checked.
    fn tensor_map(&self, boxes: &TensorBoxes) -> Result<TensorMap>;
}

/// The event as one of this kind of device.
pub(super) fn own<T: Event>(event: &dyn Event) -> Result<&T> {
    let event: &dyn Any = event;
    event.downcast_ref().ok_or_else(elsewhere)
}

/// Streams, events and graphs stay on their device.
pub(super) fn elsewhere() -> Error {
    Error::usage("a stream, event or graph of one device cannot be used with one of another device")
}
