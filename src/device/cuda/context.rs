//! The context in which everything on a GPU happens.

use std::mem::MaybeUninit;
use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

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
    graphs: Mutex<Graphs>,
}

/// Graphs that are alive, by when their captures ended. Each may use all memory that was there by then, and may
/// be launched again.
#[derive(Default)]
pub(super) struct Graphs {
    /// Captures that have ended.
    ended: u64,
    alive: Vec<u64>,
}

impl Graphs {
    /// Counts a graph whose capture ends now, until it is [removed](Self::remove).
    pub(super) fn add(&mut self) -> u64 {
        self.alive.push(self.ended);
        self.ended += 1;
        self.ended - 1
    }

    pub(super) fn remove(&mut self, graph: u64) {
        self.alive.retain(|&alive| alive != graph);
    }

    /// When memory begins that is made now.
    pub(super) fn now(&self) -> u64 {
        self.ended
    }

    /// Whether no graph uses memory that was made at `birth`.
    pub(super) fn spare(&self, birth: u64) -> bool {
        self.alive.iter().all(|&graph| graph < birth)
    }
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
        Ok(Self::new(raw, Some(device)))
    }

    fn new(raw: CUcontext, retained: Option<CUdevice>) -> Self {
        Self { raw, retained, captures: AtomicUsize::new(0), graphs: Mutex::default() }
    }

    pub(super) fn graphs(&self) -> MutexGuard<'_, Graphs> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
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
        Ok((Self::new(raw, None), device))
    }

    /// Whether somebody else owns it.
    pub(super) fn is_lent(&self) -> bool {
        self.retained.is_none()
    }

    /// Whether it is this one.
    pub(super) fn is(&self, raw: CUcontext) -> bool {
        self.raw == raw
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
