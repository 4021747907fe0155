//! Handles of `cust` 0.3 as ours: its streams and memory are those of the context that all of CUDA shares, so kernels of
//! [`Kernels::for_current_context`](super::Kernels::for_current_context) run there.
//!
//! No more is made of cust than its handles. Its elements are its own: it knows `f16` and `bf16` of half 1.8 alone, so
//! memory for them is a `DeviceBuffer<u16>` here, and the pointer is [cast](Ptr::cast). A stream of it waits for the
//! default stream, whatever flags it was made with. Its `context::legacy` contexts are others than the shared one; what
//! belongs to one is refused by [`borrow_stream`](super::Device::borrow_stream) and
//! [`from_raw`](super::Buffer::from_raw) of a device that does not.

use cust::memory::{DeviceCopy, DevicePointer};
use cust::stream::Stream;

use super::{Ptr, RawStream};

impl From<&Stream> for RawStream {
    /// The handle, valid as long as the stream.
    fn from(stream: &Stream) -> Self {
        Self(stream.as_inner().cast())
    }
}

impl<T: DeviceCopy> From<DevicePointer<T>> for Ptr<T> {
    fn from(pointer: DevicePointer<T>) -> Self {
        Self::from_raw(pointer.as_raw())
    }
}
