//! The checked launch.

use half::bf16;

use super::MAX_CLASSES;
use super::raw::{LossParams, Precision, launch};
use crate::device::{Buffer, Ptr, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{Rows, check_len, check_some};
use crate::ops::{ClassificationLoss, LossKind};

/// Cross-entropy of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// What the loss is.
    pub of: ClassificationLoss,
    /// Image slots N.
    pub images: usize,
    /// Classes K, 1 to [`MAX_CLASSES`].
    pub classes: usize,
}

/// `[N, K]`, in rows that hold K rounded up to 8.
#[derive(Clone, Copy)]
pub enum Logits<'a> {
    /// An activation.
    Bf16(Rows<'a, bf16>),
    /// A result in full precision.
    F32(Rows<'a, f32>),
}

/// What each image should be recognised as.
#[derive(Clone, Copy)]
pub enum Targets<'a> {
    /// `[N]` classes.
    Classes(&'a Buffer<i32>),
    /// `[N, K]` soft targets.
    Soft(&'a Buffer<f32>),
}

/// Operands of the loss.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    /// Logits.
    pub logits: Logits<'a>,
    /// Targets.
    pub targets: Targets<'a>,
    /// `[N]` weights, 0 on unused slots, whose logits and targets then do not matter.
    pub weights: &'a Buffer<f32>,
    /// One number, a factor on the gradient; none is 1.
    pub scale: Option<&'a Buffer<f32>>,
    /// `[N]`, written: weight × loss.
    pub loss: &'a Buffer<f32>,
    /// `[N, K]`, written, in rows that hold K rounded up to 8: zeros in the columns after K.
    pub dlogits: Rows<'a, bf16>,
    /// `[N]`, written: how many classes are ahead of the target's (0: recognised, below 5: among the first
    /// five), −1 at weight 0. The target is the class, or the largest soft target. Equal logits rank by class,
    /// NaN above everything.
    pub rank: Option<&'a Buffer<i32>>,
    /// One word, set where a label is no class, see [`fault`](super::fault).
    pub error: Option<&'a Buffer<i32>>,
}

impl CrossEntropy {
    fn check(&self) -> Result<()> {
        if self.images == 0 || self.images > 1 << 30 {
            return Err(Error::usage(format!(
                "a loss over {} image slots is not possible; give 1 to 2^30",
                self.images
            )));
        }
        if self.classes == 0 || self.classes > MAX_CLASSES {
            return Err(Error::usage(format!(
                "a loss over {} classes is not possible: the kernels take 1 to {MAX_CLASSES}",
                self.classes
            )));
        }
        let ClassificationLoss { kind, smoothing, temperature } = self.of;
        if !(0.0..=1.0).contains(&smoothing) {
            return Err(Error::usage(format!("label smoothing is {smoothing}, expected 0 to 1")));
        }
        let positive = temperature > 0.0 && temperature.is_finite();
        if !positive || (kind != LossKind::Softmax && temperature != 1.0) {
            return Err(Error::usage(format!(
                "the temperature of the loss is {temperature}, expected 1, or of a softmax any positive number"
            )));
        }
        Ok(())
    }

    /// Queues loss, gradient and rank.
    ///
    /// # Errors
    /// Sizes that do not fit together, rows that are not aligned, a launch that the device refuses.
    pub fn launch(&self, stream: &Stream, args: &Operands<'_>) -> Result<()> {
        self.check()?;
        let Self { of, images, classes } = *self;
        let smoothing = of.smoothing;
        let width = classes.next_multiple_of(8);
        let (precision, logits, logits_stride) = match &args.logits {
            Logits::Bf16(rows) => (Precision::Bf16, rows.check("logits", images, width)?.cast(), rows.stride),
            Logits::F32(rows) => (Precision::F32, rows.check("logits", images, width)?.cast(), rows.stride),
        };
        let (labels, soft) = match args.targets {
            Targets::Classes(labels) => (check_len("targets", labels, &[images])?, Ptr::null()),
            Targets::Soft(soft) => (Ptr::null(), check_len("targets", soft, &[images, classes])?),
        };
        let params = LossParams {
            loss: check_len("loss", args.loss, &[images])?,
            dlogits: args.dlogits.check("dlogits", images, width)?,
            rank: check_some("rank", args.rank, &[images])?,
            logits,
            labels,
            soft,
            weights: check_len("weights", args.weights, &[images])?,
            scale: check_some("scale", args.scale, &[1])?,
            error: check_some("error", args.error, &[1])?,
            logits_stride: logits_stride as i64,
            dlogits_stride: args.dlogits.stride as i64,
            kept: (1.0 - smoothing) as f32,
            floor: (smoothing / classes as f64) as f32,
            sharpness: (1.0 / of.temperature) as f32,
            unit: of.unit(classes) as f32,
            slope: of.slope(classes) as f32,
            images: images as i32,
            classes: classes as i32,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch(stream.device().kernels(), stream.raw(), of.kind, precision, &params) }
    }
}
