//! Raw launches of products whose rows come or go in chunks.

use crate::Result;
use crate::device::{Kernels, Launch, Ptr, RawStream, TensorBoxes, TensorElement, TensorSwizzle};

use super::super::raw::{GemmParams, HopperGemmParams, hopper_with};
use super::super::tiles::{self, Kind, Layout, MOST_CHUNKS};
use super::ShardedPlan;

/// Chunks of the rows of a product; `kernels/gemm/shards.cuh` says what each means.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GemmShards {
    /// `[chunks]`, not 0 where the rows are there, lowered by the launch; or null: all are.
    pub ready: Ptr<i32>,
    /// One number, 0 before and after the launch; needed where there is `ready`.
    pub ended: Ptr<i32>,
    /// `[chunks]` or null: for each chunk, the warps that have written their part of a tile are added.
    pub done: Ptr<i32>,
    /// Rows of a chunk.
    pub rows: i32,
    /// Number of chunks, of which the rows of the product are a multiple.
    pub chunks: i32,
    /// Chunks in the order in which they are met.
    pub order: [i32; MOST_CHUNKS],
}

/// Mirror of `GemmShardedParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct GemmShardedParams {
    gemm: GemmParams,
    shards: GemmShards,
}

/// Mirror of `HopperGemmShardedParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct HopperGemmShardedParams {
    whole: HopperGemmParams,
    shards: GemmShards,
}

/// Queues the product. `dependent`: it may be started before the launch before it has ended.
///
/// # Errors
/// The device refuses the launch.
///
/// # Safety
/// As for [`raw::gemm`](super::super::raw::gemm), with words as [`GemmShards`] says, whose `rows` times `chunks` are
/// the rows of the product. [`Layout::Nt`] or [`Layout::Nn`], [`Kind::Store`] or [`Kind::Sum`], of a tile that
/// [has](tiles::Tile::has_sharded) such a kernel.
pub unsafe fn gemm_sharded(
    kernels: &Kernels,
    stream: RawStream,
    (layout, kind): (Layout, Kind),
    plan: &ShardedPlan,
    params: &GemmParams,
    shards: &GemmShards,
    dependent: bool,
) -> Result<()> {
    let name = tiles::sharded_name(layout, kind, plan.tile);
    if plan.tile.hopper.is_none() {
        let launch = Launch::new([plan.blocks, 1, 1], plan.tile.threads(), plan.shared_bytes());
        let params = GemmShardedParams { gemm: *params, shards: *shards };
        // SAFETY: the caller answers for addresses and stream.
        return unsafe { kernels.launch(&name, Launch { dependent, ..launch }, stream, &params) };
    }
    let own = if plan.tile.shares_a() { plan.tile.m / 2 } else { plan.tile.m };
    let stride = 2 * params.lda as u64;
    let a = kernels.tensor_map(&TensorBoxes {
        element: TensorElement::Bf16,
        address: params.a.address(),
        sizes: &[params.k as u32, shards.rows as u32, shards.chunks as u32],
        strides: &[stride, stride * shards.rows as u64],
        tile: &[64, own, 1],
        swizzle: TensorSwizzle::Bytes128,
    })?;
    let (whole, launch) = hopper_with(kernels, layout, &plan.whole(), params, a)?;
    let params = HopperGemmShardedParams { whole, shards: *shards };
    // SAFETY: as above.
    unsafe { kernels.launch(&name, Launch { dependent, ..launch }, stream, &params) }
}
