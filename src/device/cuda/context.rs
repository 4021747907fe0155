//! The context in which everything on a GPU happens.

use std::mem::MaybeUninit;
use std::sync::atomic::AtomicUsize;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUcontext, CUdevice};

use super::driver::failed;
use crate::{Error, Result};

/// A context: the primary one of a GPU, which is shared with every engine in the process, or one that
/// somebody else owns.
pub(super) struct Context {
    raw: CUcontext,
    /// The GPU whose primary context was retained here.
    retained: Option<CUdevice>,
    /// Captures that are under way on its streams. Freeing waits for the device, which no capture survives.
    pub(super) captures: AtomicUsize,
}

// SAFETY: the driver's contexts may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn primary(device: CUdevice) -> Result<Self> {
        // SAFETY: released once, in `drop`.
        let raw = unsafe { result::primary_ctx::retain(device) };
        let raw = raw.map_err(failed("no context can be made on the GPU"))?;
        Ok(Self { raw, retained: Some(device), captures: AtomicUsize::new(0) })
    }

    /// The context that is current on this thread, and its GPU.
    pub(super) fn current() -> Result<(Self, CUdevice)> {
        let raw = result::ctx::get_current().map_err(failed("the current CUDA context cannot be found"))?;
        let raw = raw.ok_or_else(|| {
            Error::usage("no CUDA context is current on this thread; make one current, or open a device")
        })?;
        let mut device = 0;
        // SAFETY: writes the number of the GPU.
        let outcome = unsafe { sys::cuCtxGetDevice(&raw mut device) }.result();
        outcome.map_err(failed("the GPU of the current CUDA context cannot be found"))?;
        Ok((Self { raw, retained: None, captures: AtomicUsize::new(0) }, device))
    }

    /// Makes the context current on this thread, where it is not. It stays so.
    pub(super) fn bind(&self) -> Result<()> {
        if matches!(result::ctx::get_current(), Ok(Some(current)) if current == self.raw) {
            return Ok(());
        }
        // SAFETY: the context is alive, for it is retained or the owner has promised so.
        let outcome = unsafe { result::ctx::set_current(self.raw) };
        outcome.map_err(failed("the context of the GPU cannot be used"))
    }

    /// Runs `work` with the context current and then restores what was.
    pub(super) fn within(&self, work: impl FnOnce()) {
        // SAFETY: the context is alive; a push is undone by a pop.
        unsafe {
            if sys::cuCtxPushCurrent_v2(self.raw).result().is_err() {
                return;
            }
            work();
            let mut popped = MaybeUninit::uninit();
            let _ = sys::cuCtxPopCurrent_v2(popped.as_mut_ptr()).result();
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(device) = self.retained {
            // SAFETY: retained in `primary`. A failure leaves a context that ends with the process.
            let _ = unsafe { result::primary_ctx::release(device) };
        }
    }
}
