//! Raw launches of masked attention pooling.

use half::bf16;

use super::instances::{FINISH_THREADS, THREADS, VARIANTS, attention_name};
use super::{PackedSizes, grid};
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::Result;
use crate::kernels::gemm::raw::{SumRowsParams, sum_rows};

/// Most queries: their state lies in shared memory.
pub const MAX_QUERIES: usize = 8;
/// Widest head: a warp holds a row, eight elements a lane.
pub const MAX_HEAD_DIM: usize = 256;

/// Three sums over 256 columns of each warp.
const FINISH_SHARED_BYTES: u32 = 3 * 256 * 4 * FINISH_THREADS / 32;

/// Constants of the kernels, mirror of `PoolAttentionShape`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Factor on the scores.
    pub scale: f32,
    /// Epsilon of the norm.
    pub eps: f32,
    /// Token rows.
    pub tokens: i32,
    /// Image slots, at least 1.
    pub images: i32,
    /// Heads.
    pub heads: i32,
    /// Width of a head: a multiple of 8, at most [`MAX_HEAD_DIM`].
    pub head_dim: i32,
    /// Queries, at most [`MAX_QUERIES`].
    pub queries: i32,
    /// Tokens of every image that are left out.
    pub skip: i32,
    /// Norm of q and k: 0 none, 1 RMS, 2 LayerNorm.
    pub norm: i32,
    /// 1 where gains and biases are `[heads, head_dim]`, 0 where they are `[head_dim]`.
    pub per_head: i32,
}

/// Query, gains and biases, mirror of `PoolAttentionQuery`. Without a norm all gains and biases are null.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionQuery {
    /// `[queries, heads·head_dim]`; null where `q_f32` is given.
    pub q: Ptr<bf16>,
    /// The same in f32.
    pub q_f32: Ptr<f32>,
    /// Null is 1.
    pub q_gain: Ptr<f32>,
    /// Null is 0.
    pub q_bias: Ptr<f32>,
    /// Null is 1.
    pub k_gain: Ptr<f32>,
    /// Null is 0.
    pub k_bias: Ptr<f32>,
}

/// Arguments of the forward kernels, mirror of `PoolAttentionForward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttentionForwardParams {
    /// `[images, queries, heads·head_dim]`, written.
    pub out: Ptr<bf16>,
    /// `[images, queries, heads]`, written: log-sum-exp of the scaled scores.
    pub lse: Ptr<f32>,
    /// Workspace of [`AttentionShape::forward_workspace_bytes`].
    pub partial: Ptr<f32>,
    /// Token rows of `heads·head_dim`, [`k_stride`](Self::k_stride) elements apart.
    pub k: Ptr<bf16>,
    /// Likewise.
    pub v: Ptr<bf16>,
    /// The query and the norm's parameters.
    pub query: AttentionQuery,
    /// `[images + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// Set where `cu_seqlens` is no list of images, see [`fault`](super::fault); may be null.
    pub error: Ptr<i32>,
    /// A multiple of 8.
    pub k_stride: i64,
    /// A multiple of 8.
    pub v_stride: i64,
    /// Constants.
    pub shape: AttentionShape,
}

/// Arguments of the backward kernels, mirror of `PoolAttentionBackward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttentionBackwardParams {
    /// Token rows, [`dk_stride`](Self::dk_stride) elements apart, all written.
    pub dk: Ptr<bf16>,
    /// Likewise.
    pub dv: Ptr<bf16>,
    /// Workspace of [`AttentionShape::backward_workspace_bytes`].
    pub partial: Ptr<f32>,
    /// The last `heads·queries·head_dim` elements of that workspace.
    pub sums: Ptr<f32>,
    /// Gradient of `out`.
    pub dout: Ptr<bf16>,
    /// As the forward pass wrote it.
    pub out: Ptr<bf16>,
    /// As the forward pass wrote it.
    pub lse: Ptr<f32>,
    /// As in the forward pass.
    pub k: Ptr<bf16>,
    /// As in the forward pass.
    pub v: Ptr<bf16>,
    /// As in the forward pass.
    pub query: AttentionQuery,
    /// Gradient of the query in bf16, written; may be null.
    pub dq: Ptr<bf16>,
    /// Gradient of the query in f32, written or added to; may be null.
    pub dq_f32: Ptr<f32>,
    /// Written or added to; may be null.
    pub dq_gain: Ptr<f32>,
    /// Written or added to; may be null.
    pub dq_bias: Ptr<f32>,
    /// Written or added to; may be null.
    pub dk_gain: Ptr<f32>,
    /// Written or added to; may be null. Its gradient is 0.
    pub dk_bias: Ptr<f32>,
    /// Not 0: f32 gradients are added to. Null: they are written.
    pub accumulate: Ptr<i32>,
    /// `[images + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// Set where `cu_seqlens` is no list of images, see [`fault`](super::fault); may be null.
    pub error: Ptr<i32>,
    /// A multiple of 8.
    pub dk_stride: i64,
    /// A multiple of 8.
    pub dv_stride: i64,
    /// A multiple of 8.
    pub k_stride: i64,
    /// A multiple of 8.
    pub v_stride: i64,
    /// Constants.
    pub shape: AttentionShape,
}

impl AttentionShape {
    fn sizes(&self) -> PackedSizes {
        PackedSizes { tokens: self.tokens as usize, images: self.images as usize, skip: self.skip as usize }
    }

    /// Elements of all queries.
    fn query_len(&self) -> usize {
        self.queries as usize * self.heads as usize * self.head_dim as usize
    }

    /// Bytes of workspace of the forward pass.
    pub fn forward_workspace_bytes(&self) -> usize {
        let scalars = 2 * self.queries as usize * self.heads as usize;
        self.sizes().pieces() * (self.query_len() + scalars) * size_of::<f32>()
    }

    /// Elements of the partials of the backward pass.
    pub(super) fn backward_partial_len(&self) -> usize {
        (self.sizes().pieces() + 1) * self.query_len()
    }

    /// Bytes of workspace of the backward pass.
    pub fn backward_workspace_bytes(&self) -> usize {
        (self.backward_partial_len() + self.query_len()) * size_of::<f32>()
    }

    /// Widest head of the kernel, and lanes that hold a row.
    fn variant(&self) -> (usize, u32) {
        let fits = VARIANTS.iter().find(|(widest, _)| self.head_dim as usize <= *widest);
        fits.copied().unwrap_or(VARIANTS[VARIANTS.len() - 1])
    }

    fn forward_shared_bytes(&self) -> u32 {
        let (_, lanes) = self.variant();
        let (groups, row) = (THREADS / lanes, 8 * lanes);
        4 * self.queries as u32 * (row + groups * row + 2 * groups + 1)
    }

    fn backward_shared_bytes(&self) -> u32 {
        let (_, lanes) = self.variant();
        let (groups, row) = (THREADS / lanes, 8 * lanes);
        4 * self.queries as u32 * (2 * row + groups * row + 4)
    }
}

/// Queues the forward kernels. Allocates nothing and waits for nothing.
///
/// # Errors
/// A grid that is too large, a launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned, and stays so until the kernels have
/// run; the shape is within what its fields say.
pub unsafe fn launch_attention_forward(
    kernels: &Kernels,
    stream: RawStream,
    params: &AttentionForwardParams,
) -> Result<()> {
    let shape = &params.shape;
    let blocks = shape.sizes().pieces() * shape.heads as usize;
    let main = Launch::new(grid(blocks)?, THREADS, shape.forward_shared_bytes());
    let combine = Launch::new(grid(shape.images as usize)?, THREADS, 0);
    let name = attention_name("forward", shape.variant().0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch(&name, main, stream, params)?;
        kernels.launch("pool_attention_combine_bf16", combine, stream, params)
    }
}

/// Queues the backward kernels. Allocates nothing and waits for nothing.
///
/// # Errors
/// As for [`launch_attention_forward`].
///
/// # Safety
/// As for [`launch_attention_forward`].
pub unsafe fn launch_attention_backward(
    kernels: &Kernels,
    stream: RawStream,
    params: &AttentionBackwardParams,
) -> Result<()> {
    let shape = &params.shape;
    // One piece more: the rows that belong to no image.
    let blocks = (shape.sizes().pieces() + 1) * shape.heads as usize;
    let main = Launch::new(grid(blocks)?, THREADS, shape.backward_shared_bytes());
    let sums = SumRowsParams {
        rows: params.partial,
        out: params.sums,
        accumulate: Ptr::null(),
        count: (shape.sizes().pieces() + 1) as i32,
        cols: shape.query_len() as i32,
    };
    let finish = Launch::new([1, 1, 1], FINISH_THREADS, FINISH_SHARED_BYTES);
    let name = attention_name("backward", shape.variant().0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch(&name, main, stream, params)?;
        sum_rows(kernels, stream, &sums)?;
        kernels.launch("pool_attention_finish_f32", finish, stream, params)
    }
}
