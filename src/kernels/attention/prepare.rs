//! The launch before Hopper's kernels: what they need of long images, whose rows every block meets again and again.

use half::bf16;

use super::instances::{PREPARE_BLOCKS, PREPARE_HEADS, PREPARE_THREADS, attention_prepare};
use super::raw::{QkNorm, QkStatistics};
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::Result;
use crate::kernels::Element;

/// Constant arguments of the kernel. What nobody wants, and what it would be made of, is null.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PrepareParams<E: Element = bf16> {
    /// Queries, for `q_norm`.
    pub q: Ptr<E>,
    /// Keys, for `k_norm`.
    pub k: Ptr<E>,
    /// Result of the forward pass, for `delta`.
    pub out: Ptr<E>,
    /// Its gradient, for `delta`.
    pub dout: Ptr<E>,
    /// q̂ of long images, `[tokens, heads·head_dim]`.
    pub q_norm: Ptr<E>,
    /// k̂ of long images, `[tokens, kv_heads·head_dim]`.
    pub k_norm: Ptr<E>,
    /// Σ dout ⊙ out of long images, `[tokens, heads]`.
    pub delta: Ptr<f32>,
    /// Set to 0, `turn_count` of them.
    pub turns: Ptr<i32>,
    /// `[slots + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// The work lists made from it.
    pub schedule: Ptr<i32>,
    /// As [`ForwardParams::rope`](super::raw::ForwardParams::rope).
    pub rope: Ptr<f32>,
    /// The norm.
    pub norm: QkNorm,
    /// Its statistics, of the rows that are normalised.
    pub statistics: QkStatistics,
    /// Elements between rows of `q`.
    pub q_stride: i64,
    /// Elements between rows of `k`.
    pub k_stride: i64,
    /// Elements between rows of `out`.
    pub out_stride: i64,
    /// Elements between rows of `dout`.
    pub dout_stride: i64,
    /// Token rows.
    pub tokens: i32,
    /// Image slots.
    pub slots: i32,
    /// Heads of q.
    pub heads: i32,
    /// Heads of k.
    pub kv_heads: i32,
    /// Columns of a head.
    pub head_dim: i32,
    /// As [`ForwardParams::rope_kind`](super::raw::ForwardParams::rope_kind).
    pub rope_kind: i32,
    /// [`tile_rows`](super::Limits::tile_rows) of the schedule's limits.
    pub tile_rows: i32,
    /// Length of `turns`.
    pub turn_count: i32,
}

/// Queues the kernel. `long_items` are the most items of long images that the schedule has of one head, `multiprocessors`
/// those of the device.
///
/// # Errors
/// The device refuses the launch.
///
/// # Safety
/// As for [`Kernels::launch`]; the schedule was made from `cu_seqlens` with limits of these tile rows.
pub unsafe fn prepare<E: Element>(
    kernels: &Kernels,
    stream: RawStream,
    params: &PrepareParams<E>,
    long_items: usize,
    multiprocessors: u32,
) -> Result<()> {
    let items = long_items.saturating_mul((params.heads as usize).div_ceil(PREPARE_HEADS));
    let blocks = items.clamp(1, (PREPARE_BLOCKS * multiprocessors.max(1)) as usize);
    let launch = Launch::new([blocks as u32, 1, 1], PREPARE_THREADS, 0);
    // SAFETY: the caller answers for addresses and stream.
    unsafe { kernels.launch(&attention_prepare(E::NAME), launch, stream, params) }
}
