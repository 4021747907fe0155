//! Tile, slices and clusters of Hopper's kernel: pure functions of shape and device.
//!
//! A cluster of two blocks stays on two multiprocessors and takes every (clusters)th pair of tiles, so time goes in
//! rounds of as many pairs as there are clusters. A round takes as long as the slower of the tensor cores and of
//! the copies from L2, of which each block makes those of its own operand and half of the shared one. What a block
//! writes comes on top, unless its other warpgroup multiplies meanwhile.

use super::heuristics::{Plan, Shape, group, most_splits, reduction};
use super::tiles::{HOPPER_SHARED_BYTES, HOPPER_TILES, Kind, Layout, Scheme, Tile};
use crate::device::DeviceInfo;

/// Multiply-adds of a multiprocessor per cycle by wgmma in bf16.
const RATE: f64 = 2048.0;

/// Bytes per cycle that a multiprocessor gets from L2 while all ask.
const L2_BYTES: f64 = 46.0;

/// Bytes per cycle that a multiprocessor writes while all do.
const WRITE_BYTES: f64 = 20.0;

/// Cycles until the first stage is there, and of the last result, which nothing hides.
const ENDS: f64 = 2500.0;

/// Cycles between the tiles of a warpgroup: the ring is full by then, but the tensor cores start anew.
const BETWEEN: f64 = 300.0;

/// Every plan of this product with what it takes; none where the device has no such kernels.
pub(super) fn plans(shape: Shape, kind: Kind, device: &DeviceInfo) -> Vec<(f64, Plan)> {
    let mut plans = Vec::new();
    if !device.hopper || device.shared_per_block < HOPPER_SHARED_BYTES || device.multiprocessors < 2 {
        return plans;
    }
    for tile in HOPPER_TILES.into_iter().filter(|tile| tile.has(kind)) {
        for splits in 1..=most_splits(shape, kind) {
            let most = device.multiprocessors / 2;
            let clusters = u32::try_from(items(tile, shape, splits)).unwrap_or(most).min(most);
            let group = group(pair(tile), shape, most);
            let plan = Plan { tile, stages: 0, splits, group, clusters };
            plans.push((cycles(&plan, shape, kind, device), plan));
        }
    }
    plans
}

/// What a cluster computes at once, as a tile.
fn pair(tile: Tile) -> Tile {
    if tile.shares_a() { Tile { n: 2 * tile.n, ..tile } } else { Tile { m: 2 * tile.m, ..tile } }
}

/// Pairs of tiles, times slices.
fn items(tile: Tile, shape: Shape, splits: u32) -> usize {
    let Tile { m, n, .. } = pair(tile);
    shape.m.div_ceil(m as usize) * shape.n.div_ceil(n as usize) * splits as usize
}

fn cycles(plan: &Plan, shape: Shape, kind: Kind, device: &DeviceInfo) -> f64 {
    let Tile { m, n, .. } = plan.tile;
    // Where rows are k, boxes are 64 columns wide.
    let copied =
        |extent: u32, rows_are_k: bool| if rows_are_k { extent.next_multiple_of(64) } else { extent };
    let a = f64::from(copied(m, shape.layout == Layout::Tn));
    let b = f64::from(copied(n, shape.layout != Layout::Nt));
    let (m, n) = (f64::from(m), f64::from(n));
    let bytes = if plan.tile.shares_a() { a / 2.0 + b } else { a + b / 2.0 };
    let step = 64.0 * (m * n / RATE).max(2.0 * bytes / L2_BYTES);
    let steps = shape.k.div_ceil(64).div_ceil(plan.splits as usize) as f64;
    let written = match kind {
        Kind::Store => 3.0,
        Kind::GeluGrad => 4.0,
        Kind::Sum => 8.0,
    };
    let write = m * n * written / WRITE_BYTES;
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

    fn chosen(kind: Kind, layout: Layout, m: usize, n: usize, k: usize) -> Plan {
        plan(Shape { layout, m, n, k }, kind, &DeviceInfo::h100()).unwrap()
    }

    /// Widths of ViTs get the tiles that divide them; what is written beside other work, those that hide it.
    #[test]
    fn tiles_suit_the_widths_of_vits() {
        for (n, wide) in [(768, 192), (1152, 192), (1280, 160), (1664, 208), (3072, 192), (4096, 256)] {
            let plan = chosen(Kind::Store, Layout::Nt, 8192, n, 1024);
            assert!(plan.tile.hopper.is_some(), "{n}: {plan:?}");
            let waste = |tile: Tile| n.next_multiple_of(tile.n as usize) as f64 / n as f64;
            assert!(waste(plan.tile) <= 1.1, "{n}: {plan:?}, {wide} would divide it");
        }
        for d in [768, 1024, 1152, 1280, 1408, 1664, 6144] {
            let plan = chosen(Kind::GeluGrad, Layout::Nn, 32_768, 4 * d, d);
            assert_eq!(plan.tile.hopper, Some(Scheme::PingPong), "{d}: {plan:?}");
        }
    }

    /// Multiprocessors that have work, of those that the rounds take.
    fn busy(plan: &Plan, shape: Shape) -> f64 {
        let items = items(plan.tile, shape, plan.splits);
        items as f64
            / (items.div_ceil(plan.clusters as usize) * (DeviceInfo::h100().multiprocessors as usize / 2))
                as f64
    }

    #[test]
    fn weight_gradients_are_split_until_the_device_is_busy() {
        for (m, n) in [(768, 768), (1024, 1024), (1152, 1152), (3072, 768), (5120, 1280)] {
            let shape = Shape { layout: Layout::Tn, m, n, k: 32_768 };
            let plan = plan(shape, Kind::Sum, &DeviceInfo::h100()).unwrap();
            assert!(plan.tile.hopper.is_some() && busy(&plan, shape) > 0.8, "{m}x{n}: {plan:?}");
            assert_eq!(plan.tile.n % 64, 0, "no boxes are copied in vain");
        }
    }

    #[test]
    fn small_products_and_other_devices_keep_to_the_portable_kernels() {
        assert_eq!(chosen(Kind::Store, Layout::Nt, 64, 1000, 768).tile.hopper, None);
        let portable = DeviceInfo { hopper: false, ..DeviceInfo::h100() };
        assert!(
            plans(Shape { layout: Layout::Nt, m: 8192, n: 768, k: 768 }, Kind::Store, &portable).is_empty()
        );
        let little = DeviceInfo { shared_per_block: 99 << 10, ..DeviceInfo::h100() };
        assert!(
            plans(Shape { layout: Layout::Nt, m: 8192, n: 768, k: 768 }, Kind::Store, &little).is_empty()
        );
    }

    /// A product whose pairs are fewer than the clusters has no idle ones.
    #[test]
    fn clusters_are_as_many_as_have_work() {
        for (m, n) in [(128, 256), (300, 512), (8192, 8192)] {
            let shape = Shape { layout: Layout::Nt, m, n, k: 512 };
            for (_, plan) in plans(shape, Kind::Store, &DeviceInfo::h100()) {
                assert!(plan.clusters >= 1 && plan.clusters as usize <= items(plan.tile, shape, 1).min(66));
            }
        }
    }
}
