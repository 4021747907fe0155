//! Tile, slices and clusters of Hopper's kernel: pure functions of shape and device.
//!
//! A cluster of two blocks stays on two multiprocessors and takes every (clusters)th pair of tiles, so time goes in
//! rounds of as many pairs as there are clusters. A round takes as long as the slowest of the tensor cores, of shared
//! memory (each stage is written once, and read by every 64 rows that are multiplied by it), and of the copies from L2,
//! of which each block makes those of its own operand and half of the shared one. What becomes of a result, whose bytes
//! and instructions go side by side, comes on top, unless the block's other warpgroup multiplies meanwhile.
//!
//! The constants are chosen so that the ranks are those of published measurements; `tools/tune-gemm` tells on a GPU what
//! a choice loses.

use super::heuristics::{Finish, Plan, Shape, group, most_splits, reduction};
use super::tiles::{HOPPER_SHARED_BYTES, HOPPER_TILES, Layout, Scheme, Tile};
use crate::device::DeviceInfo;

/// Multiply-adds of a multiprocessor per cycle by wgmma in bf16.
const RATE: f64 = 2048.0;

/// Bytes per cycle of shared memory. Were all that wgmma and copies do to it counted at its rate of 128, tiles of 128
/// columns would be slower than they are found to be.
const SHARED_BYTES: f64 = 140.0;

/// Bytes per cycle that a multiprocessor gets from L2 while all ask.
const L2_BYTES: f64 = 46.0;

/// Bytes per cycle that a multiprocessor reads and writes on the way out while all do.
const OUT_BYTES: f64 = 20.0;

/// Instructions for an element on its way out, without and with GELU, and how many so few warps issue per cycle.
const OUT_INSTRUCTIONS: [f64; 2] = [8.0, 25.0];
const ISSUED: f64 = 64.0;

/// Cycles until the first stage is there, and of the last result, which nothing hides.
const ENDS: f64 = 2500.0;

/// Cycles between the tiles of a warpgroup: the ring is full by then, but the tensor cores start anew.
const BETWEEN: f64 = 300.0;

/// Every plan of this product with what it takes; none where the device has no such kernels.
pub(super) fn plans(shape: Shape, finish: Finish, device: &DeviceInfo) -> Vec<(f64, Plan)> {
    let mut plans = Vec::new();
    if !device.hopper || device.shared_per_block < HOPPER_SHARED_BYTES || device.multiprocessors < 2 {
        return plans;
    }
    for tile in HOPPER_TILES.into_iter().filter(|tile| tile.has(finish.kind)) {
        for splits in 1..=most_splits(shape, finish.kind) {
            let most = device.multiprocessors / 2;
            let clusters = u32::try_from(items(tile, shape, splits)).unwrap_or(most).min(most);
            let group = group(pair(tile), shape, most);
            let plan = Plan { tile, stages: 0, splits, group, clusters };
            plans.push((cycles(&plan, shape, finish, device), plan));
        }
    }
    plans
}

/// What a cluster computes at once, as a tile.
pub(super) fn pair(tile: Tile) -> Tile {
    if tile.shares_a() { Tile { n: 2 * tile.n, ..tile } } else { Tile { m: 2 * tile.m, ..tile } }
}

/// Pairs of tiles, times slices.
pub(super) fn items(tile: Tile, shape: Shape, splits: u32) -> usize {
    let Tile { m, n, .. } = pair(tile);
    shape.m.div_ceil(m as usize) * shape.n.div_ceil(n as usize) * splits as usize
}

pub(super) fn cycles(plan: &Plan, shape: Shape, finish: Finish, device: &DeviceInfo) -> f64 {
    let Tile { m, n, .. } = plan.tile;
    // Where rows are k, boxes are 64 columns wide.
    let copied =
        |extent: u32, rows_are_k: bool| if rows_are_k { extent.next_multiple_of(64) } else { extent };
    let a = f64::from(copied(m, shape.layout == Layout::Tn));
    let b = f64::from(copied(n, shape.layout != Layout::Nt));
    let (m, n) = (f64::from(m), f64::from(n));
    let bytes = if plan.tile.shares_a() { a / 2.0 + b } else { a + b / 2.0 };
    let shared = 2.0 * (m / 64.0 * (64.0 + n) + a + b) / SHARED_BYTES;
    let step = 64.0 * (m * n / RATE).max(shared).max(2.0 * bytes / L2_BYTES);
    let steps = shape.k.div_ceil(64).div_ceil(plan.splits as usize) as f64;
    let instructions = OUT_INSTRUCTIONS[usize::from(finish.gelu)];
    let write = m * n * (f64::from(finish.bytes) / OUT_BYTES).max(instructions / ISSUED);
    let multiply = steps * step + BETWEEN;
    let tile = match plan.tile.hopper {
        Some(Scheme::PingPong) => multiply.max((multiply + write) / 2.0),
        _ => multiply + write,
    };
    let rounds = items(plan.tile, shape, plan.splits).div_ceil(plan.clusters.max(1) as usize) as f64;
    let last = if plan.tile.hopper == Some(Scheme::PingPong) { write } else { 0.0 };
    rounds * tile + last + ENDS + reduction(plan.splits, shape, device)
}

#[cfg(test)]
mod tests {
    use super::super::heuristics::plan;
    use super::*;

    const PLAIN: Finish = Finish::store(false, false, false);
    const GELU: Finish = Finish::store(true, true, false);
    const GELU_GRAD: Finish = Finish::gelu_grad();
    const SUM: Finish = Finish::sum();

    fn shape(layout: Layout, m: usize, n: usize, k: usize) -> Shape {
        Shape { layout, m, n, k }
    }

    fn chosen(finish: Finish, shape: Shape) -> Plan {
        plan(shape, finish, &DeviceInfo::h100()).unwrap()
    }

    /// Of the multiply-adds that the rounds of all clusters take, those that are asked for.
    fn useful(plan: &Plan, shape: Shape) -> f64 {
        let Tile { m, n, .. } = pair(plan.tile);
        let clusters = DeviceInfo::h100().multiprocessors as usize / 2;
        let rounds = items(plan.tile, shape, plan.splits).div_ceil(plan.clusters as usize);
        (shape.m * shape.n * plan.splits as usize) as f64 / (rounds * clusters * (m * n) as usize) as f64
    }

    /// Of the rate of the tensor cores, at which a plan is expected to compute.
    fn share(plan: &Plan, shape: Shape, finish: Finish) -> f64 {
        let device = DeviceInfo::h100();
        let least =
            shape.m as f64 * shape.n as f64 * shape.k as f64 / RATE / f64::from(device.multiprocessors);
        least / cycles(plan, shape, finish, &device)
    }

    /// Neither widths that no tile divides nor last rounds cost much; but few tokens are few rounds.
    #[test]
    fn the_widths_of_vits_waste_little() {
        for (m, least) in [(8192, 0.7), (16_384, 0.75), (32_768, 0.8), (65_536, 0.8)] {
            for n in [768, 1024, 1152, 1280, 1408, 1664, 3072, 4096, 4304, 5120, 6144, 8192, 24_576] {
                let shape = shape(Layout::Nt, m, n, 1024);
                let plan = chosen(PLAIN, shape);
                assert!(plan.tile.hopper.is_some(), "{shape:?}: {plan:?}");
                let share = share(&plan, shape, PLAIN);
                assert!(share >= least, "{shape:?}: {plan:?} {share:.3}");
            }
        }
    }

    #[test]
    fn what_is_long_to_write_is_written_beside_other_work() {
        for d in [768, 1024, 1152, 1280, 1408, 1664, 6144] {
            for (finish, layout) in [(GELU, Layout::Nt), (GELU_GRAD, Layout::Nn)] {
                let plan = chosen(finish, shape(layout, 32_768, 4 * d, d));
                assert_eq!(plan.tile.hopper, Some(Scheme::PingPong), "{d}: {plan:?}");
            }
        }
    }

    #[test]
    fn weight_gradients_are_split_until_the_device_is_busy() {
        for (m, n) in [(768, 768), (1024, 1024), (1152, 1152), (3072, 768), (5120, 1280)] {
            let shape = shape(Layout::Tn, m, n, 32_768);
            let plan = chosen(SUM, shape);
            assert!(plan.tile.hopper.is_some() && useful(&plan, shape) > 0.8, "{m}x{n}: {plan:?}");
            assert_eq!(plan.tile.n % 64, 0, "no boxes are copied in vain");
        }
    }

    #[test]
    fn small_products_and_other_devices_keep_to_the_portable_kernels() {
        assert_eq!(chosen(PLAIN, shape(Layout::Nt, 64, 1000, 768)).tile.hopper, None);
        let large = shape(Layout::Nt, 8192, 768, 768);
        let portable = DeviceInfo { hopper: false, ..DeviceInfo::h100() };
        assert!(plans(large, PLAIN, &portable).is_empty());
        let little = DeviceInfo { shared_per_block: 99 << 10, ..DeviceInfo::h100() };
        assert!(plans(large, PLAIN, &little).is_empty());
    }

    /// A product whose pairs are fewer than the clusters has no idle ones.
    #[test]
    fn clusters_are_as_many_as_have_work() {
        for (m, n) in [(128, 256), (300, 512), (8192, 8192)] {
            let shape = shape(Layout::Nt, m, n, 512);
            for (_, plan) in plans(shape, PLAIN, &DeviceInfo::h100()) {
                assert!(plan.clusters >= 1 && plan.clusters as usize <= items(plan.tile, shape, 1).min(66));
            }
        }
    }

    /// Clusters that work at the same time read a part of both operands that is nearly square.
    #[test]
    fn groups_count_pairs() {
        let shape = shape(Layout::Nt, 65_536, 24_576, 6144);
        for (_, plan) in plans(shape, PLAIN, &DeviceInfo::h100()) {
            let Tile { m, n, .. } = pair(plan.tile);
            let (columns, rows) = (plan.group * n, 66u32.div_ceil(plan.group) * m);
            assert!(columns < 2 * rows && rows < 2 * columns, "{plan:?}: {columns} x {rows}");
        }
    }
}
