//! Softmax and sigmoid cross-entropy: loss, gradient and rank of the target in one pass over the logits.

mod checked;
mod raw;

pub use super::registry::loss as instances;
pub use checked::{CrossEntropy, Logits, Operands, Targets};
pub use raw::{LossParams, Precision, launch};

use crate::error::{Error, Result};

/// Most classes.
pub const MAX_CLASSES: usize = instances::VARIANTS[instances::VARIANTS.len() - 1].0;

/// What the error word says that the kernels set, once it has been copied to the host.
///
/// # Errors
/// A label was no class: loss and gradient of its image are NaN.
pub fn fault(word: i32) -> Result<()> {
    match word {
        0 => Ok(()),
        _ => Err(Error::usage(
            "a label on the device is not a class of the logits, so its loss is NaN; give labels from 0 to the \
             number of classes - 1",
        )),
    }
}
