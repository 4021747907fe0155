//! Ctrl-C and SIGTERM: the first asks the loop to finish its step and save, the second ends the
//! process at once. A hang-up is left alone: `nohup` keeps ignoring it, and otherwise it kills,
//! which a checkpoint survives.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::{Error, Result};

/// Exit code of a process that a signal ended, by the shells' convention for SIGINT.
pub const INTERRUPTED: i32 = 130;

/// Whether the user has asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes over Ctrl-C and SIGTERM for the rest of the process.
    ///
    /// # Errors
    /// [`Error::Failure`] if the system refuses.
    pub fn install() -> Result<Self> {
        let interrupt = Self::default();
        for signal in [SIGINT, SIGTERM] {
            // Called in this order: a signal that finds the flag set ends the process.
            flag::register_conditional_shutdown(signal, INTERRUPTED, interrupt.0.clone())
                .and_then(|_| flag::register(signal, interrupt.0.clone()))
                .map_err(|cause| Error::failure(format_args!("cannot handle interrupts: {cause}")))?;
        }
        Ok(interrupt)
    }

    /// Whether the loop should finish its step, save and return.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Asks to stop, as a signal does.
    pub fn request(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
