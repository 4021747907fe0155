//! The checked launch.

use half::bf16;

use super::raw::{ContrastiveParams, launch};
use super::workspace::{MAX_WIDTH, Workspace};
use crate::device::{Buffer, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{Rows, check_len, check_some, check_workspace};
use crate::ops::ContrastiveKind;

/// Most pairs: what a launch counts blocks for, with room.
const MAX_PAIRS: usize = 1 << 24;

/// A loss of pairs of images and texts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contrastive {
    /// Softmax or sigmoid.
    pub kind: ContrastiveKind,
    /// Pairs N.
    pub pairs: usize,
    /// Columns D of a vector, a multiple of 8 to [`MAX_WIDTH`].
    pub width: usize,
}

/// Operands of the loss.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    /// `[N, D]`, of any length.
    pub images: Rows<'a, bf16>,
    /// `[N, D]`, of any length.
    pub texts: Rows<'a, bf16>,
    /// `[N]`: what has weight 0 is compared with nothing, and its vectors may be anything.
    pub weights: &'a Buffer<f32>,
    /// One number, the logarithm of the factor on the scores.
    pub scale: &'a Buffer<f32>,
    /// One number, added to the scores of a sigmoid; none is 0.
    pub bias: Option<&'a Buffer<f32>>,
    /// One number, a factor on the gradients; none is 1.
    pub loss_scale: Option<&'a Buffer<f32>>,
    /// `[N]`, written: weight × loss.
    pub per_pair: &'a Buffer<f32>,
    /// `[N, D]`, all rows written, zeros at weight 0.
    pub dimages: Rows<'a, bf16>,
    /// `[N, D]`, all rows written, zeros at weight 0.
    pub dtexts: Rows<'a, bf16>,
    /// One number, written.
    pub dscale: &'a Buffer<f32>,
    /// One number, written.
    pub dbias: Option<&'a Buffer<f32>>,
    /// `[N]`, written: how many texts are ahead of the image's own (0: retrieved), −1 at weight 0. Equal scores rank
    /// by their number, NaN above everything; an own score of NaN gives the largest number.
    pub rank: Option<&'a Buffer<i32>>,
}

impl Contrastive {
    /// What lies between the launches.
    ///
    /// # Errors
    /// No pairs or more than 2^24, a width that is no multiple of 8 to [`MAX_WIDTH`].
    pub fn workspace(&self) -> Result<Workspace> {
        let Self { pairs, width, .. } = *self;
        if pairs == 0 || pairs > MAX_PAIRS {
            return Err(Error::usage(format!(
                "a contrastive loss of {pairs} pairs is not possible; give 1 to 2^24"
            )));
        }
        if width == 0 || width > MAX_WIDTH || !width.is_multiple_of(8) {
            return Err(Error::usage(format!(
                "a contrastive loss has vectors of {width} columns, expected a multiple of 8 to {MAX_WIDTH}"
            )));
        }
        Ok(Workspace { pairs, width })
    }

    /// Queues loss, gradients and ranks; the workspace has [`Workspace::bytes`].
    ///
    /// # Errors
    /// What [`workspace`](Self::workspace) refuses, a bias of a softmax, sizes that do not fit together, rows that
    /// are not aligned, a launch that the device refuses.
    pub fn launch(&self, stream: &Stream, args: &Operands<'_>, workspace: &Buffer<u8>) -> Result<()> {
        let sizes = self.workspace()?;
        let Self { kind, pairs, width } = *self;
        if kind == ContrastiveKind::Softmax && (args.bias.is_some() || args.dbias.is_some()) {
            return Err(Error::usage(
                "a softmax contrastive loss has a bias, which cancels; leave it out, or use sigmoid",
            ));
        }
        let [inverse, partial, score, log_sum, ahead, sums, dunit, used] =
            sizes.addresses(check_workspace(workspace, sizes.bytes())?);
        let params = ContrastiveParams {
            images: args.images.check("images", pairs, width)?,
            texts: args.texts.check("texts", pairs, width)?,
            weights: check_len("weights", args.weights, &[pairs])?,
            scale: check_len("scale", args.scale, &[1])?,
            bias: check_some("bias", args.bias, &[1])?,
            loss_scale: check_some("loss_scale", args.loss_scale, &[1])?,
            per_pair: check_len("per_pair", args.per_pair, &[pairs])?,
            dimages: args.dimages.check("dimages", pairs, width)?,
            dtexts: args.dtexts.check("dtexts", pairs, width)?,
            dscale: check_len("dscale", args.dscale, &[1])?,
            dbias: check_some("dbias", args.dbias, &[1])?,
            rank: check_some("rank", args.rank, &[pairs])?,
            inverse: inverse.cast(),
            partial: partial.cast(),
            score: score.cast(),
            log_sum: log_sum.cast(),
            ahead: ahead.cast(),
            sums: sums.cast(),
            dunit: dunit.cast(),
            used: used.cast(),
            images_stride: args.images.stride as i64,
            texts_stride: args.texts.stride as i64,
            dimages_stride: args.dimages.stride as i64,
            dtexts_stride: args.dtexts.stride as i64,
            pairs: pairs as i32,
            width: width as i32,
            splits: sizes.splits() as i32,
            unused: 0,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch(stream.device().kernels(), stream.raw(), kind, &params) }
    }
}
