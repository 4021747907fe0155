//! Ctrl-C and SIGTERM: the first asks the loop to finish its step and save, the second ends the
//! process at once.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

/// Exit code of a process that a signal ended, by the shells' convention for SIGINT.
pub const INTERRUPTED: i32 = 130;

/// Whether the user has asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes over Ctrl-C, SIGTERM and SIGHUP for the rest of the process. Once a process.
    ///
    /// # Errors
    /// [`Error::Failure`] if the system refuses or it was done before.
    pub fn install() -> Result<Self> {
        let interrupt = Self::default();
        let flag = interrupt.clone();
        // Whoever starts a job in the background may have it ignore Ctrl-C; that is no other handler.
        ctrlc::set_handler(move || {
            if flag.0.swap(true, Ordering::SeqCst) {
                std::process::exit(INTERRUPTED);
            }
            // Nobody reads standard error after a hang-up, and then a failed write must not panic.
            // The progress bar next redraws its two lines: it takes the empty ones.
            let _ = std::io::stderr()
                .write_all(b"\nstopping once this step is saved; interrupt again to stop at once\n\n");
        })
        .map_err(|cause| Error::failure(format_args!("cannot handle interrupts: {cause}")))?;
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
