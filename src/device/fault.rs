//! What kernels find wrong with their operands: told by the next synchronisation of a stream.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::{Buffer, Device, Pinned, Ptr, Stream};
use crate::Result;

/// A word in device memory that kernels set where an operand makes no sense, 0 before. As long as it lives,
/// [`Stream::synchronize`] on its device tells what it says.
pub struct Fault {
    word: Buffer<i32>,
    seen: Mutex<Pinned<i32>>,
    explain: fn(i32) -> Result<()>,
}

/// The words of a device.
#[derive(Default)]
pub(super) struct Faults(Mutex<Vec<Weak<Fault>>>);

impl Device {
    /// A word that `explain` turns into an error where it is not 0. It is never cleared.
    ///
    /// # Errors
    /// No room on the device.
    pub fn fault(&self, explain: fn(i32) -> Result<()>) -> Result<Arc<Fault>> {
        let fault = Arc::new(Fault { word: self.zeros(1)?, seen: Mutex::new(self.pinned(1)?), explain });
        let mut known = self.faults().0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|fault| fault.strong_count() > 0);
        known.push(Arc::downgrade(&fault));
        Ok(fault)
    }
}

impl Fault {
    /// Where kernels write.
    pub fn ptr(&self) -> Ptr<i32> {
        self.word.ptr()
    }

    /// Waits for the device and tells what was found since the word was made.
    ///
    /// # Errors
    /// What the word says; whatever else went wrong on the device.
    pub fn check(&self) -> Result<()> {
        (self.explain)(self.word.download()?.first().copied().unwrap_or(0))
    }

    /// Queues the reading of the word.
    pub(super) fn fetch(&self, stream: &Stream) -> Result<()> {
        self.word.read_pinned(stream, &mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells what was read last.
    pub(super) fn tell(&self) -> Result<()> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        (self.explain)(seen.read()?.first().copied().unwrap_or(0))
    }
}

impl Faults {
    /// Those that live.
    pub(super) fn live(&self) -> Vec<Arc<Fault>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
    }
}
