//! Raw launches of the residual connection.

use half::bf16;

use super::instances::THREADS;
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::Result;

/// Vectors of eight columns of a block of the forward pass.
const VECTORS: usize = 4 * THREADS as usize;
/// Columns of a block of the backward pass.
const COLUMNS: u32 = 64;
/// Rows of a block of the backward pass, and so of a partial sum.
pub const SLICE_ROWS: usize = 256;

/// Arguments of the forward kernel, mirror of `ResidualForward`: `out = x + keep · scale ⊙ branch`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ForwardParams {
    /// Rows, [`out_stride`](Self::out_stride) elements apart, all written; may be `x`.
    pub out: Ptr<bf16>,
    /// Rows.
    pub x: Ptr<bf16>,
    /// Rows.
    pub branch: Ptr<bf16>,
    /// LayerScale, `[width]`; null is 1.
    pub scale: Ptr<f32>,
    /// Stochastic depth, `[tokens]`; null is 1.
    pub keep: Ptr<f32>,
    /// One number: rows that hold anything, such as the last entry of `cu_seqlens`. The others are not read and
    /// are written as zeros. Null: all.
    pub live: Ptr<i32>,
    /// A multiple of 8, as all strides.
    pub out_stride: i64,
    /// Elements between rows.
    pub x_stride: i64,
    /// Elements between rows.
    pub branch_stride: i64,
    /// Token rows, at least 1; `tokens · width / 8` is below 2^31.
    pub tokens: i32,
    /// Columns, a multiple of 8.
    pub width: i32,
}

/// Arguments of the backward kernel, mirror of `ResidualBackward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BackwardParams {
    /// Rows, [`dbranch_stride`](Self::dbranch_stride) elements apart, all written; may be `dout`.
    pub dbranch: Ptr<bf16>,
    /// Partial sums, a row of `width` for each slice, written; null: not wanted.
    pub dscale: Ptr<f32>,
    /// Gradient of `out`, rows.
    pub dout: Ptr<bf16>,
    /// As in the forward pass; read where `dscale` is wanted.
    pub branch: Ptr<bf16>,
    /// As in the forward pass.
    pub scale: Ptr<f32>,
    /// As in the forward pass.
    pub keep: Ptr<f32>,
    /// As in the forward pass.
    pub live: Ptr<i32>,
    /// A multiple of 8, as all strides.
    pub dbranch_stride: i64,
    /// Elements between rows.
    pub dout_stride: i64,
    /// Elements between rows.
    pub branch_stride: i64,
    /// Token rows, at least 1.
    pub tokens: i32,
    /// Columns, a multiple of 8.
    pub width: i32,
    /// Rows of a slice: [`SLICE_ROWS`].
    pub rows: i32,
}

/// Bytes of workspace that hold the partial sums of `dscale`.
pub fn backward_workspace_bytes(tokens: usize, width: usize) -> usize {
    tokens.div_ceil(SLICE_ROWS) * width * size_of::<f32>()
}

/// Queues the forward kernel. Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned (`keep` and `live` 4), and stays so until the
/// kernel has run; sizes and strides are as their fields say.
pub unsafe fn launch_forward(kernels: &Kernels, stream: RawStream, params: &ForwardParams) -> Result<()> {
    let vectors = params.tokens as usize * params.width as usize / 8;
    let launch = Launch::new([vectors.div_ceil(VECTORS) as u32, 1, 1], THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("residual_forward_bf16", launch, stream, params) }
}

/// Queues the backward kernel, which leaves a row of `dscale` for every slice, for
/// [`sum_rows`](crate::kernels::gemm::raw::sum_rows). Allocates nothing and waits for nothing.
///
/// # Errors
/// As for [`launch_forward`].
///
/// # Safety
/// As for [`launch_forward`].
pub unsafe fn launch_backward(kernels: &Kernels, stream: RawStream, params: &BackwardParams) -> Result<()> {
    let slices = (params.tokens as u32).div_ceil(params.rows as u32);
    let grid = [(params.width as u32).div_ceil(COLUMNS), slices, 1];
    // The sums of 32 groups of lanes.
    let launch = Launch::new(grid, THREADS, 32 * COLUMNS * 4);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("residual_backward_bf16", launch, stream, params) }
}
