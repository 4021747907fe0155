//! Which tile and how many blocks: pure functions of shape, chunks and device.
//!
//! The models are those of whole products, of a device with fewer multiprocessors and of chunks whose last tiles are
//! counted whole: no tile has rows of two. That all chunks come in time is taken for granted; whoever waits longest waits
//! for the last, whatever the tile.

use super::super::heuristics::{self, Finish, Plan, Shape};
use super::super::hopper;
use super::super::tiles::{HOPPER_SHARED_BYTES, SHARDED_TILES, Tile};
use super::Chunks;
use crate::device::DeviceInfo;

/// How a product in chunks is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardedPlan {
    /// Part of the result that a block computes at a time.
    pub tile: Tile,
    /// Stages of the ring in shared memory; 0 on Hopper.
    pub stages: u32,
    /// Columns of tiles that are walked down together.
    pub group: u32,
    /// Blocks, which stay for all the work; pairs of them on Hopper.
    pub blocks: u32,
}

impl ShardedPlan {
    /// The same for the whole product at once, but for the blocks of every GPU's kernel.
    pub(super) fn whole(&self) -> Plan {
        let clusters = if self.tile.hopper.is_some() { self.blocks / 2 } else { 0 };
        Plan { tile: self.tile, stages: self.stages, splits: 1, group: self.group, clusters }
    }

    /// Dynamic shared memory of a block.
    pub fn shared_bytes(&self) -> u32 {
        self.whole().shared_bytes()
    }

    /// Tiles of a chunk.
    pub(super) fn tiles(&self, chunks: &Chunks, n: usize) -> usize {
        self.whole().tiles(chunks.rows(), n)
    }

    /// Warps that write the `n` columns of a chunk, a tile after the other: what [`Done`](super::Done) counts up to.
    pub fn writers(&self, chunks: &Chunks, n: usize) -> u32 {
        (self.tiles(chunks, n) as u32).saturating_mul(self.tile.writers())
    }
}

/// The plan with the least cycles on a device of which `reserve` multiprocessors are left alone; `None` where no tile
/// fits, or no multiprocessor is left.
pub fn plan(
    shape: Shape,
    chunks: &Chunks,
    finish: Finish,
    device: &DeviceInfo,
    reserve: u32,
) -> Option<ShardedPlan> {
    plans(shape, chunks, finish, device, reserve).first().copied()
}

/// The best plan of every tile that the device has room for, the one with the least cycles first.
pub fn plans(
    shape: Shape,
    chunks: &Chunks,
    finish: Finish,
    device: &DeviceInfo,
    reserve: u32,
) -> Vec<ShardedPlan> {
    let device =
        DeviceInfo { multiprocessors: device.multiprocessors.saturating_sub(reserve), ..device.clone() };
    let mut all: Vec<(f64, ShardedPlan)> = SHARDED_TILES
        .into_iter()
        .filter(|tile| tile.has_sharded(shape.layout, finish.kind))
        .filter_map(|tile| match tile.hopper {
            Some(_) => on_hopper(tile, shape, chunks, finish, &device),
            None => on_every_gpu(tile, shape, chunks, &device),
        })
        .collect();
    all.sort_by(|(x, _), (y, _)| x.total_cmp(y));
    all.into_iter().map(|(_, plan)| plan).collect()
}

/// A product with as many rows as tiles of `m` rows have for all chunks.
fn padded(shape: Shape, chunks: &Chunks, m: u32) -> Shape {
    Shape { m: chunks.len() * chunks.rows().next_multiple_of(m as usize), ..shape }
}

fn on_hopper(
    tile: Tile,
    shape: Shape,
    chunks: &Chunks,
    finish: Finish,
    device: &DeviceInfo,
) -> Option<(f64, ShardedPlan)> {
    let most = device.multiprocessors / 2;
    if !device.hopper || device.shared_per_block < HOPPER_SHARED_BYTES || most == 0 {
        return None;
    }
    let pair = hopper::pair(tile);
    let padded = padded(shape, chunks, pair.m);
    let clusters = u32::try_from(hopper::items(tile, padded, 1)).unwrap_or(most).min(most);
    let group = heuristics::group(pair, padded, most);
    let plan = ShardedPlan { tile, stages: 0, group, blocks: 2 * clusters };
    Some((hopper::cycles(&plan.whole(), padded, finish, device), plan))
}

fn on_every_gpu(
    tile: Tile,
    shape: Shape,
    chunks: &Chunks,
    device: &DeviceInfo,
) -> Option<(f64, ShardedPlan)> {
    let (stages, resident) = heuristics::residency(tile, device)?;
    let most = device.multiprocessors * resident;
    if most == 0 {
        return None;
    }
    let padded = padded(shape, chunks, tile.m);
    let group = heuristics::group(tile, padded, most);
    let mut plan = ShardedPlan { tile, stages, group, blocks: most };
    let tiles = plan.tiles(chunks, shape.n).saturating_mul(chunks.len());
    plan.blocks = u32::try_from(tiles).unwrap_or(most).min(most);
    Some((heuristics::cycles(&plan.whole(), padded, resident, device), plan))
}

#[cfg(test)]
mod tests {
    use super::super::super::tiles::{Kind, Layout};
    use super::*;

    fn chunks(count: usize, rows: usize) -> Chunks {
        Chunks::new(rows, (0..count).collect()).unwrap()
    }

    fn shape(layout: Layout, chunks: &Chunks, n: usize, k: usize) -> Shape {
        Shape { layout, m: chunks.batch(), n, k }
    }

    const PLAIN: Finish = Finish::store(false, false, false);

    /// What transports are left is left: a block of Hopper's kernel has a multiprocessor to itself.
    #[test]
    fn reserved_multiprocessors_are_left_alone() {
        let device = DeviceInfo::h100();
        let chunks = chunks(8, 1024);
        let shape = shape(Layout::Nt, &chunks, 24_576 / 8, 6144);
        for reserve in [0, 1, 16, 130] {
            let plan = plan(shape, &chunks, PLAIN, &device, reserve).unwrap();
            assert!(plan.tile.hopper.is_some() && plan.blocks.is_multiple_of(2));
            assert!(plan.blocks <= 132 - reserve && plan.blocks + 2 > 132 - reserve, "{plan:?}");
        }
        let portable = DeviceInfo { hopper: false, ..device.clone() };
        let plan_of = |reserve| plan(shape, &chunks, PLAIN, &portable, reserve);
        assert_eq!(plan_of(12).unwrap().blocks, 120 * plan_of(131).unwrap().blocks);
        assert_eq!((plan_of(132), plan_of(200)), (None, None));
    }

    #[test]
    fn short_chunks_have_small_tiles() {
        let portable = DeviceInfo { hopper: false, ..DeviceInfo::h100() };
        let chosen = |rows| {
            let chunks = chunks(8, rows);
            plan(shape(Layout::Nn, &chunks, 1024, 1024), &chunks, PLAIN, &portable, 0).unwrap().tile
        };
        assert_eq!((chosen(64).m, chosen(4096).m), (64, 128));
    }

    #[test]
    fn there_are_no_more_blocks_than_tiles() {
        let chunks = chunks(2, 100);
        for finish in [PLAIN, Finish::sum()] {
            let plans = plans(shape(Layout::Nn, &chunks, 72, 64), &chunks, finish, &DeviceInfo::h100(), 0);
            assert!(plans.len() >= 4 && plans.iter().all(|plan| plan.blocks <= 8), "{plans:?}");
        }
    }

    #[test]
    fn writers_are_warps_of_the_tiles_of_a_chunk() {
        let chunks = chunks(4, 130);
        let tile = |m, n, hopper: bool| {
            SHARDED_TILES.into_iter().find(|t| (t.m, t.n, t.hopper.is_some()) == (m, n, hopper)).unwrap()
        };
        let writers = |tile| ShardedPlan { tile, stages: 3, group: 1, blocks: 2 }.writers(&chunks, 300);
        assert_eq!(writers(tile(64, 64, false)), 3 * 5 * 4);
        assert_eq!(writers(tile(128, 128, false)), 2 * 3 * 4);
        assert_eq!(writers(tile(128, 256, true)), 2 * 2 * 8);
        assert_eq!(writers(tile(128, 192, true)), 2 * 2 * 4);
    }

    #[test]
    fn weight_gradients_have_no_such_kernel() {
        let chunks = chunks(2, 128);
        let tn = Shape { layout: Layout::Tn, m: 256, n: 128, k: 128 };
        assert!(plans(tn, &chunks, Finish::sum(), &DeviceInfo::h100(), 0).is_empty());
        assert!(SHARDED_TILES.iter().all(|tile| !tile.has_sharded(Layout::Nn, Kind::GeluGrad)));
    }
}
