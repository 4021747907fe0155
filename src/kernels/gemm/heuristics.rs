//! Which tile, how many stages, how many slices of k: pure functions of shape and device.
//!
//! The model counts cycles. A block's step over k takes as long as the slowest of three: the tensor cores,
//! the bandwidth of shared memory (each fragment is read once a warp, each tile written once), and its share
//! of the L2 cache's bandwidth. Blocks of one multiprocessor share its units and hide each other's latency;
//! the last wave is charged for what it leaves idle. Only ratios matter: the model ranks choices and
//! predicts no time.

use crate::device::DeviceInfo;

use super::tiles::{Kind, Layout, MAX_STAGES, MIN_STAGES, TILES, Tile};

/// Extents of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How the operands lie.
    pub layout: Layout,
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Part of the result that a block computes.
    pub tile: Tile,
    /// Stages of the ring in shared memory.
    pub stages: u32,
    /// Slices of k that are summed separately; more than 1 for f32 results alone.
    pub splits: u32,
    /// Columns of tiles that are walked down together.
    pub group: u32,
}

/// Stages beyond this many hide no more latency.
const ENOUGH_STAGES: u32 = 4;

/// Shared memory of a block that the system keeps for itself.
const RESERVED: u32 = 1024;

/// Cycles to fill the ring and to write the results, whatever the size of the tile.
const BLOCK_CYCLES: f64 = 2500.0;

/// Cycles of another launch that waits for the one before.
const LAUNCH_CYCLES: f64 = 6000.0;

/// Share of a multiprocessor's rate that a lone block of 4 warps reaches: nothing hides its waits.
const LONE_BLOCK: f64 = 0.75;

/// Bytes of device memory per cycle and multiprocessor.
const MEMORY_BYTES: f64 = 16.0;

/// Most slices of k, and fewest elements of k in one.
const MAX_SPLITS: u32 = 16;
const MIN_SLICE: usize = 256;

impl Plan {
    /// Dynamic shared memory of a block.
    pub const fn shared_bytes(&self) -> u32 {
        self.stages * self.tile.stage_bytes()
    }

    /// Blocks that cover the result once.
    pub const fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.tile.m as usize) * n.div_ceil(self.tile.n as usize)
    }
}

/// The plan with the least cycles.
///
/// Every row of the result is summed in the same order by every plan with one slice, so the bits of a
/// forward pass depend on no choice made here. `None` where not even the smallest tile fits the device's
/// shared memory, which no GPU since Ampere is.
pub fn plan(shape: Shape, kind: Kind, device: &DeviceInfo) -> Option<Plan> {
    let mut best: Option<(f64, Plan)> = None;
    for tile in TILES {
        let Some((stages, resident)) = residency(tile, device) else { continue };
        let most = match kind {
            Kind::Sum => u32::try_from(shape.k / MIN_SLICE).unwrap_or(MAX_SPLITS).clamp(1, MAX_SPLITS),
            Kind::Store | Kind::GeluGrad => 1,
        };
        for splits in 1..=most {
            let group = group(tile, shape, device.multiprocessors * resident);
            let plan = Plan { tile, stages, splits, group };
            let cycles = cycles(&plan, shape, resident, device);
            if best.is_none_or(|(least, _)| cycles < least) {
                best = Some((cycles, plan));
            }
        }
    }
    best.map(|(_, plan)| plan)
}

/// Stages of a tile and blocks of it on a multiprocessor: as many blocks as registers allow, then as many
/// stages as are of use; fewer blocks where the ring would be too short.
fn residency(tile: Tile, device: &DeviceInfo) -> Option<(u32, u32)> {
    (1..=tile.blocks).rev().find_map(|blocks| {
        let room =
            (device.shared_per_multiprocessor / blocks).saturating_sub(RESERVED).min(device.shared_per_block);
        let stages = (room / tile.stage_bytes()).min(if tile.k == 32 { MAX_STAGES } else { ENOUGH_STAGES });
        (stages >= MIN_STAGES).then_some((stages, blocks))
    })
}

/// Multiply-adds of a multiprocessor per cycle by mma.sync in bf16.
fn rate(capability: (u32, u32)) -> f64 {
    match capability {
        (8, 0) => 1024.0,
        (9 | 10, _) => 1280.0,
        _ => 512.0,
    }
}

/// Cycles of a plan.
fn cycles(plan: &Plan, shape: Shape, resident: u32, device: &DeviceInfo) -> f64 {
    let Tile { m, n, k, warp_m, warp_n, .. } = plan.tile;
    let [m, n, warp_m, warp_n] = [m, n, warp_m, warp_n].map(f64::from);
    // Per element of k.
    let tensor = m * n / rate(device.capability);
    let fragments = 2.0 * m * n * (1.0 / warp_m + 1.0 / warp_n);
    let shared = (fragments + 2.0 * (m + n)) / 128.0;
    let l2 = 2.0 * (m + n) / 64.0;
    let steps = shape.k.div_ceil(k as usize).div_ceil(plan.splits as usize) * k as usize;
    let block = steps as f64 * tensor.max(shared).max(l2) + BLOCK_CYCLES;

    let blocks = plan.tiles(shape.m, shape.n) * plan.splits as usize;
    let slots = (device.multiprocessors * resident) as usize;
    let (full, rest) = (blocks / slots, blocks % slots);
    let last = rest.div_ceil(device.multiprocessors as usize);
    let alone = |blocks: usize| if blocks == 1 && plan.tile.threads() <= 128 { LONE_BLOCK } else { 1.0 };
    let mut cycles = full as f64 * f64::from(resident) * block / alone(resident as usize)
        + last as f64 * block / alone(last);
    if plan.splits > 1 {
        // Every slice is written and read once.
        let bytes = 8.0 * f64::from(plan.splits) * shape.m as f64 * shape.n as f64;
        cycles += LAUNCH_CYCLES + bytes / (MEMORY_BYTES * f64::from(device.multiprocessors));
    }
    cycles
}

/// Columns of tiles walked down together so that `resident` blocks in a row read the fewest rows and
/// columns of the operands.
fn group(tile: Tile, shape: Shape, resident: u32) -> u32 {
    let wide = u32::try_from(shape.n.div_ceil(tile.n as usize)).unwrap_or(u32::MAX).max(1);
    let reads = |group: u32| group * tile.n + resident.div_ceil(group) * tile.m;
    (1..=wide.min(32)).min_by_key(|&group| reads(group)).unwrap_or(1)
}
