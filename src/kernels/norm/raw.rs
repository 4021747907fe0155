//! Raw launches of the norms.

use half::bf16;

use super::instances::SUMS_WARPS;
use super::{backward_variant, forward_variant};
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::Result;

/// Arguments of the forward kernels, mirror of `NormForward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ForwardParams {
    /// Rows, [`y_stride`](Self::y_stride) elements apart, all written.
    pub y: Ptr<bf16>,
    /// Likewise where there is a branch; may be `x`. Else null.
    pub x_out: Ptr<bf16>,
    /// `[tokens, 2]`, written: mean (0 for RMSNorm) and reciprocal standard deviation.
    pub stats: Ptr<f32>,
    /// Rows that are normalised, or to which the branch is added.
    pub x: Ptr<bf16>,
    /// Rows of the residual branch; null: none.
    pub branch: Ptr<bf16>,
    /// LayerScale, `[width]`; null is 1.
    pub scale: Ptr<f32>,
    /// Stochastic depth, `[tokens]`; null is 1.
    pub keep: Ptr<f32>,
    /// `[width]`; null is 1.
    pub gain: Ptr<f32>,
    /// `[width]`; null is 0.
    pub bias: Ptr<f32>,
    /// One number: rows that hold anything, such as the last entry of `cu_seqlens`. The others are not read and
    /// are written as zeros. Null: all.
    pub live: Ptr<i32>,
    /// A multiple of 8, as all strides.
    pub y_stride: i64,
    /// Elements between rows.
    pub x_out_stride: i64,
    /// Elements between rows.
    pub x_stride: i64,
    /// Elements between rows.
    pub branch_stride: i64,
    /// Token rows, at least 1.
    pub tokens: i32,
    /// Columns, a multiple of 8, at most [`MAX_WIDTH`](super::MAX_WIDTH).
    pub width: i32,
    /// 1 for LayerNorm, 0 for RMSNorm.
    pub layer_norm: i32,
    /// Added to the variance.
    pub eps: f32,
}

/// Arguments of the backward kernels, mirror of `NormBackward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BackwardParams {
    /// Rows, [`dx_stride`](Self::dx_stride) elements apart, all written; may be `dy` or `dresidual`.
    pub dx: Ptr<bf16>,
    /// Gradient of the branch, rows, all written; null: no branch.
    pub dbranch: Ptr<bf16>,
    /// Partial sums, [`partial_rows`] rows of `width`, written; null: not wanted.
    pub dgain: Ptr<f32>,
    /// Likewise.
    pub dbias: Ptr<f32>,
    /// Likewise; asks for `branch` and `dbranch`.
    pub dscale: Ptr<f32>,
    /// Gradient of `y`.
    pub dy: Ptr<bf16>,
    /// What everything else that reads `x` adds to its gradient; null is 0.
    pub dresidual: Ptr<bf16>,
    /// What was normalised: `x_out` where there was a branch.
    pub x: Ptr<bf16>,
    /// As in the forward pass; read where `dscale` is wanted.
    pub branch: Ptr<bf16>,
    /// As the forward pass wrote it.
    pub stats: Ptr<f32>,
    /// As in the forward pass.
    pub gain: Ptr<f32>,
    /// As in the forward pass.
    pub scale: Ptr<f32>,
    /// As in the forward pass.
    pub keep: Ptr<f32>,
    /// As in the forward pass.
    pub live: Ptr<i32>,
    /// A multiple of 8, as all strides.
    pub dx_stride: i64,
    /// Elements between rows.
    pub dbranch_stride: i64,
    /// Elements between rows.
    pub dy_stride: i64,
    /// Elements between rows.
    pub dresidual_stride: i64,
    /// Elements between rows.
    pub x_stride: i64,
    /// Elements between rows.
    pub branch_stride: i64,
    /// Token rows, at least 1.
    pub tokens: i32,
    /// Columns, a multiple of 8, at most [`MAX_WIDTH`](super::MAX_WIDTH).
    pub width: i32,
    /// 1 for LayerNorm, 0 for RMSNorm.
    pub layer_norm: i32,
}

/// Arguments of the kernel that adds up partial sums, mirror of `NormSums`: up to three of them at once.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SumsParams {
    /// `[count, width]` each.
    pub partial: [Ptr<f32>; 3],
    /// `[width]` each, written or added to; null where not wanted.
    pub out: [Ptr<f32>; 3],
    /// One number: whether `out` is added to (not 0) or overwritten (0, or null).
    pub accumulate: Ptr<i32>,
    /// Rows of the partials.
    pub count: i32,
    /// Columns.
    pub width: i32,
}

/// Rows of partial sums that the backward pass leaves, one a block: a block for every place on the device's
/// `multiprocessors`, or fewer where there are few rows.
pub fn partial_rows(tokens: usize, width: usize, multiprocessors: u32) -> usize {
    let variant = backward_variant(width);
    let places = multiprocessors.max(1) as usize * variant.min_blocks as usize;
    tokens.div_ceil(variant.rows_of_block()).clamp(1, places)
}

/// Bytes of workspace that hold the partial sums of `gradients` of the parameters (gain, bias, scale).
pub fn backward_workspace_bytes(
    tokens: usize,
    width: usize,
    gradients: usize,
    multiprocessors: u32,
) -> usize {
    gradients * partial_rows(tokens, width, multiprocessors) * width * size_of::<f32>()
}

/// Queues the forward kernel. Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned (`stats` 8, `keep` and `live` 4), and stays so
/// until the kernel has run; sizes and strides are as their fields say.
pub unsafe fn launch_forward(kernels: &Kernels, stream: RawStream, params: &ForwardParams) -> Result<()> {
    let variant = forward_variant(params.width as usize);
    let blocks = (params.tokens as usize).div_ceil(variant.rows_of_block());
    let launch =
        Launch::new([blocks as u32, 1, 1], super::instances::FORWARD_THREADS, variant.shared_bytes());
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch(&variant.name(), launch, stream, params) }
}

/// Queues the backward kernel, which leaves [`partial_rows`] partial sums for [`launch_sums`]. Allocates nothing
/// and waits for nothing.
///
/// # Errors
/// As for [`launch_forward`].
///
/// # Safety
/// As for [`launch_forward`].
pub unsafe fn launch_backward(kernels: &Kernels, stream: RawStream, params: &BackwardParams) -> Result<()> {
    let width = params.width as usize;
    let variant = backward_variant(width);
    let blocks = partial_rows(params.tokens as usize, width, kernels.info().multiprocessors);
    let launch = Launch::new([blocks as u32, 1, 1], variant.threads(), variant.shared_bytes());
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch(&variant.name(), launch, stream, params) }
}

/// Queues the sums of the partials; nothing where none is wanted.
///
/// # Errors
/// As for [`launch_forward`].
///
/// # Safety
/// As for [`launch_forward`].
pub unsafe fn launch_sums(kernels: &Kernels, stream: RawStream, params: &SumsParams) -> Result<()> {
    if params.out.iter().all(|out| out.is_null()) {
        return Ok(());
    }
    let launch =
        Launch::new([(params.width as u32).div_ceil(32), 3, 1], 32 * SUMS_WARPS, 4 * 32 * SUMS_WARPS);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("norm_sums_f32", launch, stream, params) }
}
