//! Raw launches: constant arguments as the kernels read them, nothing checked, nothing allocated, nothing
//! waited for.

use half::bf16;

use super::super::instances::{
    BACKWARD_SMALL_BLOCKS, BACKWARD_SUM, BACKWARD_SUM_COLUMNS, BACKWARD_SUM_SHARED, BACKWARD_THREADS,
    HOPPER_BACKWARD_FINISH_SHARED, HOPPER_BACKWARD_THREADS, backward_groups, backward_prepare,
    hopper_backward_finish,
};
use super::super::prepare::{PrepareParams, prepare};
use super::super::raw::{QkNorm, QkStatistics};
use super::plan::BackwardPlan;
use super::workspace::{LongParts, Workspace};
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::Result;
use crate::kernels::Element;

/// Constant arguments of the backward kernels. Head h of token t begins at element `t·stride + h·head_dim`;
/// addresses and strides are multiples of 16 bytes. Head h of q has head `h·kv_heads/heads` of k and v, rounded down.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BackwardParams<E: Element = bf16> {
    /// Queries, as the forward pass took them.
    pub q: Ptr<E>,
    /// Keys.
    pub k: Ptr<E>,
    /// Values.
    pub v: Ptr<E>,
    /// Result of the forward pass.
    pub out: Ptr<E>,
    /// Its gradient.
    pub dout: Ptr<E>,
    /// Gradient of q, all token rows written.
    pub dq: Ptr<E>,
    /// Gradient of k, likewise.
    pub dk: Ptr<E>,
    /// Gradient of v, likewise.
    pub dv: Ptr<E>,
    /// `[tokens, heads]`, as the forward pass wrote it.
    pub lse: Ptr<f32>,
    /// Workspace, `[tokens, heads]`.
    pub delta: Ptr<f32>,
    /// Workspace, `[rows, heads, 4, head_dim]` of [`Workspace::partial_rows`] rows; null where no gradient of a gain
    /// or bias is wanted.
    pub partial: Ptr<f32>,
    /// `[slots + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// What [`schedule`](super::super::raw::schedule) has made with the plan's limits.
    pub schedule: Ptr<i32>,
    /// As [`ForwardParams::rope`](super::super::raw::ForwardParams::rope).
    pub rope: Ptr<f32>,
    /// The norm.
    pub norm: QkNorm,
    /// Elements between rows of `q`.
    pub q_stride: i64,
    /// Elements between rows of `k`.
    pub k_stride: i64,
    /// Elements between rows of `v`.
    pub v_stride: i64,
    /// Elements between rows of `out`.
    pub out_stride: i64,
    /// Elements between rows of `dout`.
    pub dout_stride: i64,
    /// Elements between rows of `dq`.
    pub dq_stride: i64,
    /// Elements between rows of `dk`.
    pub dk_stride: i64,
    /// Elements between rows of `dv`.
    pub dv_stride: i64,
    /// Token rows.
    pub tokens: i32,
    /// Image slots.
    pub slots: i32,
    /// Heads of q.
    pub heads: i32,
    /// Heads of k and v, a divisor of `heads`.
    pub kv_heads: i32,
    /// Columns of a head.
    pub head_dim: i32,
    /// [`BackwardPlan::short_rows`].
    pub short_rows: i32,
    /// [`tile_rows`](super::super::Limits::tile_rows) of the plan's limits.
    pub tile_rows: i32,
    /// As [`ForwardParams::rope_kind`](super::super::raw::ForwardParams::rope_kind).
    pub rope_kind: i32,
    /// Fills the struct.
    pub unused: i32,
    /// Factor on the scores, above 0.
    pub scale: f32,
}

/// Gradients of gains and biases, `[heads, head_dim]` (those of k `[kv_heads, head_dim]`) or `[head_dim]` as the norm says;
/// each may be null.
#[derive(Clone, Copy, Debug)]
pub struct AffineGrad {
    /// dγq.
    pub q_gain: Ptr<f32>,
    /// dβq.
    pub q_bias: Ptr<f32>,
    /// dγk.
    pub k_gain: Ptr<f32>,
    /// dβk. Without a rotation a bias on k cancels in the softmax, and what comes out is rounding; with one it has a
    /// gradient.
    pub k_bias: Ptr<f32>,
    /// One flag: where it is not 0 the gradients are added to; null is 0.
    pub accumulate: Ptr<i32>,
}

/// Constant arguments of the kernel that sums `partial`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct SumParams {
    partial: Ptr<f32>,
    q_gain: Ptr<f32>,
    q_bias: Ptr<f32>,
    k_gain: Ptr<f32>,
    k_bias: Ptr<f32>,
    accumulate: Ptr<i32>,
    blocks: i32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    per_head: i32,
    unused: i32,
}

/// Constant arguments of the kernel that sums dk and dv over the heads of q that share them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct GroupsParams<E: Element> {
    dk_of_heads: Ptr<E>,
    dv_of_heads: Ptr<E>,
    dk: Ptr<E>,
    dv: Ptr<E>,
    dk_stride: i64,
    dv_stride: i64,
    tokens: i32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
}

/// Constant arguments of Hopper's kernel, and of the one that finishes its dq.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct HopperParams<E: Element> {
    all: BackwardParams<E>,
    long: LongParts<E>,
    q_norm_stride: i64,
    k_norm_stride: i64,
    width: i32,
    blocks: i32,
}

fn small(blocks: usize, shared: u32) -> Launch {
    Launch::new([blocks as u32, 1, 1], BACKWARD_THREADS, shared)
}

/// Queues the backward pass: rows of no image and what long images need, the gradients, their sums over heads that share
/// keys and values, and where `params.partial` is not null the sums over blocks. `workspace` is the plan's, at `base`.
///
/// # Errors
/// The device refuses a launch.
///
/// # Safety
/// As for [`Kernels::launch`]; the schedule was made with the plan's limits from the same `cu_seqlens`, and promised
/// what the workspace was made for; `lse` and `out` are those of a forward pass with the same operands.
pub unsafe fn backward<E: Element>(
    kernels: &Kernels,
    stream: RawStream,
    plan: &BackwardPlan,
    params: &BackwardParams<E>,
    workspace: &Workspace,
    base: Ptr<u8>,
    affine: &AffineGrad,
) -> Result<()> {
    let Some([dk_of_heads, dv_of_heads]) = workspace.groups(base) else {
        // SAFETY: the caller answers for addresses and stream.
        return unsafe { of_heads(kernels, stream, plan, params, workspace, base, affine) };
    };
    let width = i64::from(params.heads * params.head_dim);
    let of_heads_params =
        BackwardParams { dk: dk_of_heads, dv: dv_of_heads, dk_stride: width, dv_stride: width, ..*params };
    let groups = GroupsParams {
        dk_of_heads,
        dv_of_heads,
        dk: params.dk,
        dv: params.dv,
        dk_stride: params.dk_stride,
        dv_stride: params.dv_stride,
        tokens: params.tokens,
        heads: params.heads,
        kv_heads: params.kv_heads,
        head_dim: params.head_dim,
    };
    let chunks = 2 * params.tokens as usize * (params.kv_heads * params.head_dim) as usize / 8;
    let most = (BACKWARD_SMALL_BLOCKS * plan.blocks.max(1)) as usize;
    let launch = small(chunks.div_ceil(BACKWARD_THREADS as usize).clamp(1, most), 0);
    // SAFETY: the caller answers for addresses and stream.
    unsafe {
        of_heads(kernels, stream, plan, &of_heads_params, workspace, base, affine)?;
        kernels.launch(&backward_groups(E::NAME), launch, stream, &groups)
    }
}

/// The pass with dk and dv of every head of q.
///
/// # Safety
/// As for [`backward`].
unsafe fn of_heads<E: Element>(
    kernels: &Kernels,
    stream: RawStream,
    plan: &BackwardPlan,
    params: &BackwardParams<E>,
    workspace: &Workspace,
    base: Ptr<u8>,
    affine: &AffineGrad,
) -> Result<()> {
    let blocks = workspace.blocks as u32;
    let few = (params.tokens as usize).clamp(1, (BACKWARD_SMALL_BLOCKS * plan.blocks.max(1)) as usize);
    if plan.instance.hopper {
        // SAFETY: the caller answers for addresses and stream.
        unsafe { hopper(kernels, stream, plan, params, workspace, workspace.long(base))? };
    } else {
        let main = Launch::new([blocks, 1, 1], BACKWARD_THREADS, plan.shared);
        // SAFETY: the caller answers for addresses and stream.
        unsafe {
            kernels.launch(&backward_prepare(E::NAME), small(few, 0), stream, params)?;
            kernels.launch(&plan.instance.name(E::NAME), main, stream, params)?;
        }
    }
    if params.partial.is_null() {
        return Ok(());
    }
    let per_head = params.norm.per_head != 0;
    let values = 4 * if per_head { params.heads as usize } else { 1 } * params.head_dim as usize;
    let sum = SumParams {
        partial: params.partial,
        q_gain: affine.q_gain,
        q_bias: affine.q_bias,
        k_gain: affine.k_gain,
        k_bias: affine.k_bias,
        accumulate: affine.accumulate,
        blocks: workspace.partial_rows as i32,
        heads: params.heads,
        kv_heads: params.kv_heads,
        head_dim: params.head_dim,
        per_head: params.norm.per_head,
        unused: 0,
    };
    // SAFETY: the caller answers for addresses and stream.
    unsafe {
        kernels.launch(BACKWARD_SUM, small(values / BACKWARD_SUM_COLUMNS, BACKWARD_SUM_SHARED), stream, &sum)
    }
}

/// Hopper's kernel, and what goes before and behind it where an image may be long.
///
/// # Safety
/// As for [`backward`].
unsafe fn hopper<E: Element>(
    kernels: &Kernels,
    stream: RawStream,
    plan: &BackwardPlan,
    params: &BackwardParams<E>,
    workspace: &Workspace,
    long: LongParts<E>,
) -> Result<()> {
    let width = |heads| i64::from(heads * params.head_dim);
    let (is_long, normalised) = (workspace.finish_blocks > 0, !long.q_norm.is_null());
    // Key blocks of a long image wait for their turns.
    let main = Launch {
        resident: is_long,
        ..Launch::new([workspace.blocks as u32, 1, 1], HOPPER_BACKWARD_THREADS, plan.shared)
    };
    let mut all = HopperParams {
        all: *params,
        long,
        q_norm_stride: width(params.heads),
        k_norm_stride: width(params.kv_heads),
        width: plan.instance.width as i32,
        blocks: workspace.blocks as i32,
    };
    if !normalised {
        (all.long.q_norm, all.q_norm_stride) = (params.q, params.q_stride);
        (all.long.k_norm, all.k_norm_stride) = (params.k, params.k_stride);
    }
    if is_long {
        let none = Ptr::null();
        let before = PrepareParams {
            q: params.q,
            k: params.k,
            out: params.out,
            dout: params.dout,
            q_norm: long.q_norm,
            k_norm: long.k_norm,
            delta: params.delta,
            turns: long.turns,
            cu_seqlens: params.cu_seqlens,
            schedule: params.schedule,
            rope: params.rope,
            norm: params.norm,
            statistics: QkStatistics { q_mean: none, q_rstd: none, k_mean: none, k_rstd: none },
            q_stride: params.q_stride,
            k_stride: params.k_stride,
            out_stride: params.out_stride,
            dout_stride: params.dout_stride,
            tokens: params.tokens,
            slots: params.slots,
            heads: params.heads,
            kv_heads: params.kv_heads,
            head_dim: params.head_dim,
            rope_kind: params.rope_kind,
            tile_rows: params.tile_rows,
            turn_count: workspace.turns as i32,
        };
        let items = plan.limits.long_items(params.tokens as usize, params.slots as usize);
        // SAFETY: the caller answers for addresses and stream.
        unsafe { prepare(kernels, stream, &before, items, plan.blocks)? };
    }
    // SAFETY: the caller answers for addresses and stream.
    unsafe { kernels.launch(&plan.instance.name(E::NAME), main, stream, &all)? };
    if !is_long {
        return Ok(());
    }
    let finish = small(workspace.finish_blocks, HOPPER_BACKWARD_FINISH_SHARED);
    // SAFETY: the caller answers for addresses and stream.
    unsafe { kernels.launch(&hopper_backward_finish(E::NAME), finish, stream, &all) }
}
