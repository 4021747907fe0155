//! The raw launch: constant arguments as the kernels read them, nothing checked.

use half::bf16;

use super::instances::{VARIANTS, name};
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::{Error, Result};
use crate::ops::LossKind;

/// 32 shares of each of the three joins, 8 floats together.
const SHARED_BYTES: u32 = 32 * 8 * 4;

/// Type of the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// [`LossParams::logits`] points to bf16.
    Bf16,
    /// It points to f32.
    F32,
}

/// Arguments of the kernels, mirror of `LossParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LossParams {
    /// `[images]`, written: weight × loss.
    pub loss: Ptr<f32>,
    /// Rows of [`dlogits_stride`](Self::dlogits_stride), written to `classes` rounded up to 8: zeros beyond
    /// `classes`.
    pub dlogits: Ptr<bf16>,
    /// `[images]`, written: how many classes are ahead of the target's, −1 at weight 0; may be null.
    pub rank: Ptr<i32>,
    /// bf16 or f32, rows of [`logits_stride`](Self::logits_stride), readable to `classes` rounded up to 8.
    pub logits: Ptr<u8>,
    /// `[images]` classes, or null where targets are soft.
    pub labels: Ptr<i32>,
    /// `[images, classes]` soft targets, or null where they are classes.
    pub soft: Ptr<f32>,
    /// `[images]`; an image of weight 0 gives zeros.
    pub weights: Ptr<f32>,
    /// One number, a factor on the gradient; null is 1.
    pub scale: Ptr<f32>,
    /// Set where a label is no class, see [`fault`](super::fault); may be null.
    pub error: Ptr<i32>,
    /// A multiple of 8.
    pub logits_stride: i64,
    /// A multiple of 8.
    pub dlogits_stride: i64,
    /// Factor on targets, 1 − smoothing.
    pub kept: f32,
    /// Added to targets, smoothing / classes.
    pub floor: f32,
    /// Factor on the logits of a softmax, 1 / temperature.
    pub sharpness: f32,
    /// Factor on the cross-entropy, see [`ClassificationLoss::unit`](crate::ops::ClassificationLoss::unit).
    pub unit: f32,
    /// Factor on its gradient, see [`ClassificationLoss::slope`](crate::ops::ClassificationLoss::slope).
    pub slope: f32,
    /// Rows.
    pub images: i32,
    /// Classes, 1 to [`MAX_CLASSES`](super::MAX_CLASSES).
    pub classes: i32,
}

/// Queues the loss of every image; `kind` chooses softmax or sigmoid, factors are those of `params`. Allocates nothing and waits for nothing.
///
/// # Errors
/// More classes than the kernels hold, a launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned, and stays so until the kernel has run.
pub unsafe fn launch(
    kernels: &Kernels,
    stream: RawStream,
    kind: LossKind,
    precision: Precision,
    params: &LossParams,
) -> Result<()> {
    let Some((widest, threads, ..)) =
        VARIANTS.into_iter().find(|&(widest, ..)| (1..=widest as i64).contains(&i64::from(params.classes)))
    else {
        return Err(Error::usage(format!(
            "a loss over {} classes is not possible: the kernels take 1 to {}",
            params.classes,
            super::MAX_CLASSES
        )));
    };
    let kind = match kind {
        LossKind::Softmax => "softmax",
        LossKind::Sigmoid | LossKind::Bce => "sigmoid",
    };
    let dtype = match precision {
        Precision::Bf16 => "bf16",
        Precision::F32 => "f32",
    };
    let launch = Launch::new([params.images.max(0) as u32, 1, 1], threads, SHARED_BYTES);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch(&name(kind, dtype, widest), launch, stream, params) }
}
