//! The raw launch: constant arguments as the kernels read them, nothing checked.

use half::bf16;

use super::instances::{ROW_THREADS, THREADS, name};
use super::workspace::OWN;
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::Result;
use crate::ops::ContrastiveKind;

/// Three stages of 64 and 128 rows of 128 bytes, two lists of 128 columns of 16 bytes, two numbers of each warp.
const SWEEP_SHARED_BYTES: u32 = 3 * (64 + 128) * 128 + 2 * 128 * 16 + 2 * 4 * 4;
/// Rows of a block whose warps have one each.
const ROWS: usize = ROW_THREADS as usize / 32;

/// Arguments of the kernels, mirror of `ContrastiveParams`. From [`inverse`](Self::inverse) on to
/// [`used`](Self::used) they are workspace.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ContrastiveParams {
    /// `[pairs, width]`, rows of [`images_stride`](Self::images_stride).
    pub images: Ptr<bf16>,
    /// Likewise.
    pub texts: Ptr<bf16>,
    /// `[pairs]`; what has weight 0 takes part in nothing, and its vectors may be anything.
    pub weights: Ptr<f32>,
    /// One number, the logarithm of the factor on the scores.
    pub scale: Ptr<f32>,
    /// One number, added to the scores; null is 0.
    pub bias: Ptr<f32>,
    /// One number, a factor on the gradients; null is 1.
    pub loss_scale: Ptr<f32>,
    /// `[pairs]`, written: weight × loss.
    pub per_pair: Ptr<f32>,
    /// `[pairs, width]`, all rows written.
    pub dimages: Ptr<bf16>,
    /// Likewise.
    pub dtexts: Ptr<bf16>,
    /// One number, written.
    pub dscale: Ptr<f32>,
    /// One number, written; may be null.
    pub dbias: Ptr<f32>,
    /// `[pairs]`, written: texts ahead of the image's own, −1 at weight 0; may be null.
    pub rank: Ptr<i32>,
    /// `[2, pairs]`.
    pub inverse: Ptr<f32>,
    /// `[2, splits, pairs, 2]`.
    pub partial: Ptr<f32>,
    /// `[pairs]`.
    pub score: Ptr<f32>,
    /// `[2, pairs]`.
    pub log_sum: Ptr<f32>,
    /// `[splits, pairs]`.
    pub ahead: Ptr<i32>,
    /// `[splits, pairs / 64 rounded up, 2]`.
    pub sums: Ptr<f32>,
    /// `[2, splits, pairs, width]`.
    pub dunit: Ptr<f32>,
    /// One number.
    pub used: Ptr<i32>,
    /// A multiple of 8.
    pub images_stride: i64,
    /// A multiple of 8.
    pub texts_stride: i64,
    /// A multiple of 8.
    pub dimages_stride: i64,
    /// A multiple of 8.
    pub dtexts_stride: i64,
    /// Pairs N, those of weight 0 among them.
    pub pairs: i32,
    /// Columns D, a multiple of 8.
    pub width: i32,
    /// Parts of the other side, see [`Workspace::splits`](super::Workspace::splits).
    pub splits: i32,
    /// Nothing.
    pub unused: i32,
}

/// Queues loss, gradients and ranks, five launches. Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned, and stays so until the kernels have run.
pub unsafe fn launch(
    kernels: &Kernels,
    stream: RawStream,
    kind: ContrastiveKind,
    params: &ContrastiveParams,
) -> Result<()> {
    let pairs = params.pairs.max(0) as usize;
    let (loss, sides) = match kind {
        ContrastiveKind::Softmax => ("softmax", 2),
        // The loss of a pair is the sum over its row alone.
        ContrastiveKind::Sigmoid => ("sigmoid", 1),
    };
    // One block more counts pairs, and sums up.
    let rows = Launch::new([pairs.div_ceil(ROWS) as u32 + 1, 2, 1], ROW_THREADS, 4 * ROWS as u32);
    let sweep = |sides: u32| {
        let grid = [pairs.div_ceil(OWN) as u32, params.splits as u32, sides];
        Launch::new(grid, THREADS, SWEEP_SHARED_BYTES)
    };
    let threads = Launch::new([pairs.div_ceil(ROW_THREADS as usize) as u32, 1, 1], ROW_THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch("contrastive_prepare_bf16", rows, stream, params)?;
        kernels.launch(&name("statistics", loss), sweep(sides), stream, params)?;
        kernels.launch(&name("losses", loss), threads, stream, params)?;
        kernels.launch(&name("gradient", loss), sweep(2), stream, params)?;
        kernels.launch("contrastive_finish_bf16", rows, stream, params)
    }
}
