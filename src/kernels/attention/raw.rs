//! Raw launches: constant arguments as the kernels read them, nothing checked, nothing allocated, nothing
//! waited for.

use half::bf16;

use super::heuristics::{ForwardPlan, Limits};
use super::instances::{SCHEDULE, SCHEDULE_SHARED, SCHEDULE_THREADS, Schedule};
use super::prepare::{PrepareParams, prepare};
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::{Error, Result};
use crate::kernels::Element;

/// Constant arguments of the kernel that makes the work lists. It is launched once for each batch, before
/// all layers.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ScheduleParams {
    /// `[slots + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// The lists, [`Limits::words`].
    pub words: Ptr<i32>,
    /// One word or null: set where `cu_seqlens` is refused, see [`fault`]; never cleared.
    pub error: Ptr<i32>,
    /// Image slots.
    pub slots: i32,
    /// Token rows.
    pub tokens: i32,
    /// [`Limits::short`].
    pub short_limit: i32,
    /// [`Limits::half`].
    pub half_limit: i32,
    /// [`Limits::quarter`].
    pub quarter_limit: i32,
    /// [`Limits::tile_rows`].
    pub tile_rows: i32,
    /// Most rows of an image.
    pub longest: i32,
    /// Fills the struct.
    pub unused: i32,
}

/// QK-norm of all heads, as in `kernels/attention/common.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct QkNorm {
    /// γq, `[heads, head_dim]` or `[head_dim]`; null is 1.
    pub q_gain: Ptr<f32>,
    /// γk, `[kv_heads, head_dim]` or `[head_dim]`.
    pub k_gain: Ptr<f32>,
    /// βq; null is 0.
    pub q_bias: Ptr<f32>,
    /// βk.
    pub k_bias: Ptr<f32>,
    /// 0: none, 1: RMS, 2: LayerNorm.
    pub kind: i32,
    /// Whether gains and biases are `[heads, head_dim]`, those of k `[kv_heads, head_dim]`.
    pub per_head: i32,
    /// Added to the variance.
    pub eps: f32,
    /// Fills the struct.
    pub unused: i32,
}

/// Statistics of the rows of q, `[tokens, heads]`, and k, `[tokens, kv_heads]`; all of them or none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct QkStatistics {
    /// μ of q; 0 for RMS.
    pub q_mean: Ptr<f32>,
    /// 1/σ of q.
    pub q_rstd: Ptr<f32>,
    /// μ of k.
    pub k_mean: Ptr<f32>,
    /// 1/σ of k.
    pub k_rstd: Ptr<f32>,
}

/// Constant arguments of the forward kernels. Head h of token t begins at element `t·stride + h·head_dim`;
/// addresses and strides are multiples of 16 bytes. Head h of q has head `h·kv_heads/heads` of k and v, rounded down.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ForwardParams<E: Element = bf16> {
    /// Queries.
    pub q: Ptr<E>,
    /// Keys.
    pub k: Ptr<E>,
    /// Values.
    pub v: Ptr<E>,
    /// Room for k̂ of long images, `[tokens, kv_heads·head_dim]`, where [`ForwardPlan::normalises_before`] says so; else
    /// null.
    pub k_norm: Ptr<E>,
    /// Result.
    pub out: Ptr<E>,
    /// `[tokens, heads]`: natural logarithm of the sum of the exponentials of the scaled scores.
    pub lse: Ptr<f32>,
    /// `[slots + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// What [`schedule`] has made with the plan's limits.
    pub schedule: Ptr<i32>,
    /// Cosine and sine of the angle of each pair of columns of a token, `[tokens, head_dim/2, 2]`, the same in all heads:
    /// q and k are rotated by it behind the norm. (1, 0) leaves a pair as it is. Null: no rotation.
    pub rope: Ptr<f32>,
    /// The norm.
    pub norm: QkNorm,
    /// Its statistics.
    pub statistics: QkStatistics,
    /// Elements between rows of `q`.
    pub q_stride: i64,
    /// Elements between rows of `k`.
    pub k_stride: i64,
    /// Elements between rows of `v`.
    pub v_stride: i64,
    /// Elements between rows of `out`.
    pub out_stride: i64,
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
    /// What is a pair of columns: 0 where `rope` is null, 1 a column and the next, 2 one of the first half of a head and
    /// one of the second.
    pub rope_kind: i32,
    /// Factor on the scores, above 0.
    pub scale: f32,
    /// Not 0: [`ForwardPlan::turns`].
    pub turns: i32,
    /// Not 0: blocks are pairs. [`forward`] sets it, by [`ForwardPlan::pairs`] and where an image may be long.
    pub pairs: i32,
    /// Fills the struct.
    pub unused: i32,
}

/// Queues the making of the work lists.
///
/// # Errors
/// The device refuses the launch.
///
/// # Safety
/// As for [`Kernels::launch`]; the limits are those of a [`Limits`], which also tells the number of words.
pub unsafe fn schedule(kernels: &Kernels, stream: RawStream, params: &ScheduleParams) -> Result<()> {
    let launch = Launch::new([1, 1, 1], SCHEDULE_THREADS, SCHEDULE_SHARED);
    // SAFETY: the caller answers for addresses and stream.
    unsafe { kernels.launch(SCHEDULE, launch, stream, params) }
}

/// Queues the forward pass: one launch for short images and the rows that belong to none, one for long
/// images. `longest` is what the schedule was made with; it saves the second launch where such an image is
/// short. On Hopper the one launch takes all images, after another one where [`ForwardPlan::normalises_before`] says so; its blocks are
/// clusters of two where long images are worked on in pairs.
///
/// # Errors
/// The device refuses a launch.
///
/// # Safety
/// As for [`Kernels::launch`], and the schedule was made with the plan's limits from the same `cu_seqlens`.
pub unsafe fn forward<E: Element>(
    kernels: &Kernels,
    stream: RawStream,
    plan: &ForwardPlan,
    params: &ForwardParams<E>,
    longest: usize,
) -> Result<()> {
    let (tokens, slots) = (params.tokens as usize, params.slots as usize);
    let heads = params.heads as usize;
    let items = plan.limits.long_items(tokens, slots);
    let long = plan.may_be_long(tokens, slots, longest);
    let normed = params.norm.kind != 0 || !params.rope.is_null();
    let prepares = plan.normalises_before(normed, tokens, slots, longest);
    let pairs = plan.pairs && long;
    let params = ForwardParams { pairs: i32::from(pairs), ..*params };
    let cluster = if pairs { 2 } else { 1 };
    let launch = |schedule, items: usize, shared| {
        let clusters = items.saturating_mul(heads).div_ceil(cluster as usize);
        let grid = cluster * clusters.clamp(1, (plan.blocks / cluster).max(1) as usize) as u32;
        // It waits for what prepares long images before it reads anything.
        let launch = Launch {
            cluster,
            dependent: prepares,
            ..Launch::new([grid, 1, 1], plan.instance.threads(), shared)
        };
        // SAFETY: the caller answers for addresses and stream.
        unsafe { kernels.launch(&plan.instance.forward(schedule, E::NAME), launch, stream, &params) }
    };
    if plan.instance.hopper.is_some() {
        if prepares {
            // SAFETY: the caller answers for addresses and stream.
            unsafe { prepare(kernels, stream, &params.preparation(plan), items, plan.blocks)? };
        }
        let tiles = items.saturating_mul(cluster as usize);
        return launch(Schedule::Short, slots.saturating_add(tiles).max(tokens / 8), plan.short_shared);
    }
    launch(Schedule::Short, slots.max(tokens / 8), plan.short_shared)?;
    if long {
        launch(Schedule::Long, items, plan.long_shared)?;
    }
    Ok(())
}

impl<E: Element> ForwardParams<E> {
    /// What prepares the long images for Hopper's kernel.
    fn preparation(&self, plan: &ForwardPlan) -> PrepareParams<E> {
        PrepareParams {
            q: Ptr::null(),
            k: self.k,
            out: Ptr::null(),
            dout: Ptr::null(),
            q_norm: Ptr::null(),
            k_norm: self.k_norm,
            delta: Ptr::null(),
            turns: Ptr::null(),
            cu_seqlens: self.cu_seqlens,
            schedule: self.schedule,
            rope: self.rope,
            norm: self.norm,
            statistics: self.statistics,
            q_stride: 0,
            k_stride: self.k_stride,
            out_stride: 0,
            dout_stride: 0,
            tokens: self.tokens,
            slots: self.slots,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            rope_kind: self.rope_kind,
            tile_rows: plan.limits.tile_rows as i32,
            turn_count: 0,
        }
    }
}

/// What the error word of a schedule says, once it has been copied to the host.
///
/// # Errors
/// `cu_seqlens` was refused: the results of what ran since are zeros.
pub fn fault(word: i32) -> Result<()> {
    let what = match word {
        0 => return Ok(()),
        1 => "does not begin at 0",
        2 => "decreases",
        3 => "ends beyond the token rows of the batch",
        _ => "has a longer image than was promised",
    };
    Err(Error::usage(format!(
        "cu_seqlens on the device {what}, so attention took the batch as empty; give the start of every image, \
         ascending from 0, and the end of the last one"
    )))
}

impl Limits {
    /// The constant arguments of [`schedule`].
    pub fn params(
        &self,
        cu_seqlens: Ptr<i32>,
        words: Ptr<i32>,
        error: Ptr<i32>,
        slots: usize,
        tokens: usize,
        longest: usize,
    ) -> ScheduleParams {
        ScheduleParams {
            cu_seqlens,
            words,
            error,
            slots: slots as i32,
            tokens: tokens as i32,
            short_limit: self.short as i32,
            half_limit: self.half as i32,
            quarter_limit: self.quarter as i32,
            tile_rows: self.tile_rows as i32,
            longest: longest as i32,
            unused: 0,
        }
    }
}
