//! Which tile, how many stages, how many slices of k: pure functions of shape and device.
//!
//! The model counts cycles. A block's step over k takes as long as the slowest of three: the tensor cores,
//! the bandwidth of shared memory (each fragment is read once a warp, each tile written once), and its share
//! of the L2 cache's bandwidth. Blocks of one multiprocessor share its units and hide each other's latency;
//! the last wave is charged for what it leaves idle. Only ratios matter: the model ranks choices and
//! predicts no time. Hopper's own kernel has a model of its own, in the same cycles, so that both tiers compete.

use crate::device::DeviceInfo;

use super::hopper;
use super::tiles::{HOPPER_SHARED_BYTES, Kind, Layout, MAX_STAGES, MIN_STAGES, TILES, Tile};

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
    /// Pairs of blocks that stay for all the work, on Hopper; else 0.
    pub clusters: u32,
}

/// Stages beyond this many hide no more latency.
const ENOUGH_STAGES: u32 = 4;

/// Shared memory of a block that the system keeps for itself.
const RESERVED: u32 = 1024;

/// Cycles to fill the ring, and to write a result; blocks of one multiprocessor spend them beside each
/// other's multiplications.
const FILL_CYCLES: f64 = 1500.0;
const WRITE_CYCLES: f64 = 1.0 / 16.0;

/// Cycles of another launch that waits for the one before.
const LAUNCH_CYCLES: f64 = 6000.0;

/// Share of a multiprocessor's rate that a lone block of 4 warps reaches, as nothing hides its waits.
const LONE_BLOCK: f64 = 0.75;

/// Share of the rate that small warp tiles reach, which have more loads and addresses to a multiplication.
const SMALL_WARPS: f64 = 0.85;

/// Bytes of device memory per cycle and multiprocessor.
const MEMORY_BYTES: f64 = 16.0;

/// Most slices of k, and fewest elements of k in one.
const MAX_SPLITS: u32 = 16;
const MIN_SLICE: usize = 256;

impl Plan {
    /// Dynamic shared memory of a block.
    pub const fn shared_bytes(&self) -> u32 {
        match self.tile.hopper {
            None => self.stages * self.tile.stage_bytes(),
            Some(_) => HOPPER_SHARED_BYTES,
        }
    }

    /// Blocks that cover the result once.
    pub const fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.tile.m as usize) * n.div_ceil(self.tile.n as usize)
    }
}

/// What is done to a result on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finish {
    /// The kernel that does it.
    pub kind: Kind,
    /// Bytes of memory read and written for an element.
    pub bytes: u32,
    /// Whether GELU or its slope is computed.
    pub gelu: bool,
}

impl Finish {
    /// bf16 results, with what is kept before GELU, and with a residual.
    pub const fn store(gelu: bool, pre: bool, residual: bool) -> Self {
        Self { kind: Kind::Store, bytes: 2 + 2 * (pre as u32 + residual as u32), gelu }
    }

    /// Times the slope of GELU.
    pub const fn gelu_grad() -> Self {
        Self { kind: Kind::GeluGrad, bytes: 4, gelu: true }
    }

    /// f32 results, added to what is there.
    pub const fn sum() -> Self {
        Self { kind: Kind::Sum, bytes: 8, gelu: false }
    }
}

/// The plan with the least cycles.
///
/// Every row of the result is summed in the same order by every plan with one slice, so the bits of a
/// forward pass depend on no choice made here, but for that of the tier, which is the device's and the shape's.
/// `None` where not even the smallest tile fits the device's shared memory, which no GPU since Ampere is.
pub fn plan(shape: Shape, finish: Finish, device: &DeviceInfo) -> Option<Plan> {
    plans(shape, finish, device).first().copied()
}

/// The best plan of every tile that the device has room for, the one with the least cycles first.
pub fn plans(shape: Shape, finish: Finish, device: &DeviceInfo) -> Vec<Plan> {
    let mut all = hopper::plans(shape, finish, device);
    for tile in TILES {
        let Some((stages, resident)) = residency(tile, device) else { continue };
        for splits in 1..=most_splits(shape, finish.kind) {
            let group = group(tile, shape, device.multiprocessors * resident);
            let plan = Plan { tile, stages, splits, group, clusters: 0 };
            all.push((cycles(&plan, shape, resident, device), plan));
        }
    }
    all.sort_by(|(x, _), (y, _)| x.total_cmp(y));
    let mut best: Vec<Plan> = Vec::new();
    for (_, plan) in all {
        if best.iter().all(|other| other.tile != plan.tile) {
            best.push(plan);
        }
    }
    best
}

/// Most slices of k that a product may be cut into.
pub(super) fn most_splits(shape: Shape, kind: Kind) -> u32 {
    match kind {
        Kind::Sum => u32::try_from(shape.k / MIN_SLICE).unwrap_or(MAX_SPLITS).clamp(1, MAX_SPLITS),
        Kind::Store | Kind::GeluGrad => 1,
    }
}

/// Cycles to write the slices of k and to add them up.
pub(super) fn reduction(splits: u32, shape: Shape, device: &DeviceInfo) -> f64 {
    if splits == 1 {
        return 0.0;
    }
    // Every slice is written and read once.
    let bytes = 8.0 * f64::from(splits) * shape.m as f64 * shape.n as f64;
    LAUNCH_CYCLES + bytes / (MEMORY_BYTES * f64::from(device.multiprocessors))
}

/// Stages of a tile and blocks of it on a multiprocessor: as many blocks as registers allow, then as many
/// stages as are of use; fewer blocks where the ring would be too short.
pub(super) fn residency(tile: Tile, device: &DeviceInfo) -> Option<(u32, u32)> {
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
pub(super) fn cycles(plan: &Plan, shape: Shape, resident: u32, device: &DeviceInfo) -> f64 {
    let Tile { m, n, k, warp_m, warp_n, .. } = plan.tile;
    let [m, n, warp_m, warp_n] = [m, n, warp_m, warp_n].map(f64::from);
    // Per element of k.
    let small = if warp_m * warp_n < 4096.0 { SMALL_WARPS } else { 1.0 };
    let tensor = m * n / (small * rate(device.capability));
    let fragments = 2.0 * m * n * (1.0 / warp_m + 1.0 / warp_n);
    let shared = (fragments + 2.0 * (m + n)) / 128.0;
    let l2 = 2.0 * (m + n) / 64.0;
    let steps = shape.k.div_ceil(k as usize).div_ceil(plan.splits as usize) * k as usize;
    let block = steps as f64 * tensor.max(shared).max(l2);
    let ends = FILL_CYCLES + WRITE_CYCLES * m * n;

    let blocks = plan.tiles(shape.m, shape.n) * plan.splits as usize;
    let slots = (device.multiprocessors * resident) as usize;
    let (full, rest) = (blocks / slots, blocks % slots);
    let last = rest.div_ceil(device.multiprocessors as usize);
    // Cycles of a wave with so many blocks on the busiest multiprocessor.
    let wave = |blocks: usize| {
        let alone = if blocks == 1 && plan.tile.threads() <= 128 { LONE_BLOCK } else { 1.0 };
        if blocks == 0 { 0.0 } else { blocks as f64 * block / alone + ends }
    };
    full as f64 * wave(resident as usize) + wave(last) + reduction(plan.splits, shape, device)
}

/// Columns of tiles walked down together so that `resident` of them in a row read the fewest rows and
/// columns of the operands.
pub(super) fn group(tile: Tile, shape: Shape, resident: u32) -> u32 {
    let wide = u32::try_from(shape.n.div_ceil(tile.n as usize)).unwrap_or(u32::MAX).max(1);
    let reads = |group: u32| group * tile.n + resident.div_ceil(group) * tile.m;
    (1..=wide.min(32)).min_by_key(|&group| reads(group)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, capability: (u32, u32), multiprocessors: u32, kib: u32) -> DeviceInfo {
        DeviceInfo {
            name: name.into(),
            capability,
            hopper: false,
            multiprocessors,
            shared_per_block: kib * 1024,
            shared_per_multiprocessor: (kib + 1) * 1024,
            l2_bytes: 40 << 20,
            memory_bytes: 40 << 30,
            clock_khz: 1_500_000,
            driver: None,
        }
    }

    fn devices() -> [DeviceInfo; 3] {
        [
            device("99 KB", (8, 9), 128, 99),
            device("163 KB", (8, 0), 108, 163),
            device("227 KB", (9, 0), 132, 227),
        ]
    }

    /// Linear layers of ViT-Ti to ViT-22B: width and hidden width of the MLP.
    const WIDTHS: [[usize; 2]; 9] = [
        [192, 768],
        [384, 1536],
        [768, 3072],
        [1024, 4096],
        [1152, 4304],
        [1280, 5120],
        [1408, 6144],
        [1664, 8192],
        [6144, 24576],
    ];

    /// Every product of a layer's forward and backward pass over `t` tokens.
    fn products([d, hidden]: [usize; 2], t: usize) -> Vec<(Kind, Shape)> {
        let mut all = Vec::new();
        for (inner, outer) in [(d, 3 * d), (d, d), (d, hidden), (hidden, d)] {
            let shape = |layout, m, n, k| Shape { layout, m, n, k };
            all.push((Kind::Store, shape(Layout::Nt, t, outer, inner)));
            all.push((Kind::Store, shape(Layout::Nn, t, inner, outer)));
            all.push((Kind::GeluGrad, shape(Layout::Nn, t, inner, outer)));
            all.push((Kind::Sum, shape(Layout::Tn, outer, inner, t)));
        }
        all
    }

    fn finish(kind: Kind) -> Finish {
        Finish { kind, bytes: 4, gelu: false }
    }

    fn chosen(device: &DeviceInfo, kind: Kind, shape: Shape) -> Plan {
        plan(shape, finish(kind), device).unwrap()
    }

    #[test]
    fn plans_fit_the_device() {
        for device in devices() {
            for widths in WIDTHS {
                for t in [128, 4096, 65_536] {
                    for (kind, shape) in products(widths, t) {
                        let plan = chosen(&device, kind, shape);
                        assert!((MIN_STAGES..=MAX_STAGES).contains(&plan.stages), "{plan:?}");
                        assert!(plan.shared_bytes() <= device.shared_per_block, "{plan:?}");
                        assert!(
                            plan.group >= 1 && plan.group as usize <= shape.n.div_ceil(plan.tile.n as usize)
                        );
                        assert!(plan.splits == 1 || kind == Kind::Sum, "{plan:?}");
                        assert!(shape.k / plan.splits as usize >= MIN_SLICE || plan.splits == 1, "{plan:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn large_products_keep_the_device_busy() {
        for device in devices() {
            for widths in &WIDTHS[2..] {
                for (kind, shape) in products(*widths, 65_536) {
                    let plan = chosen(&device, kind, shape);
                    let (_, resident) = residency(plan.tile, &device).unwrap();
                    let blocks = plan.tiles(shape.m, shape.n) * plan.splits as usize;
                    let slots = (device.multiprocessors * resident) as usize;
                    let computed = blocks.div_ceil(slots) * slots;
                    let wanted = (shape.m * shape.n * plan.splits as usize) as f64
                        / f64::from(plan.tile.m * plan.tile.n);
                    let busy = wanted / computed as f64;
                    assert!(busy > 0.75, "{}: {kind:?} {shape:?} {plan:?}: {busy:.2}", device.name);
                }
            }
        }
    }

    #[test]
    fn tiles_suit_the_product() {
        let [small, middle, large] = devices();
        let forward = |m, n, k| Shape { layout: Layout::Nt, m, n, k };
        for device in [&small, &middle, &large] {
            assert_eq!(chosen(device, Kind::Store, forward(128, 768, 768)).tile.m, 64, "few rows");
            assert!(chosen(device, Kind::Store, forward(65_536, 4096, 1024)).tile.m >= 128, "many rows");
        }
        // Weight gradients have few tiles and long sums: they are split until the device is busy.
        let gradient = Shape { layout: Layout::Tn, m: 1024, n: 1024, k: 65_536 };
        assert!(chosen(&large, Kind::Sum, gradient).splits > 1);
        // Stages of 64 leave two blocks of 128 x 128 three stages in 228 KB, but not in 164 or 100.
        let tile = |k| TILES.into_iter().find(|t| (t.m, t.n, t.k) == (128, 128, k)).unwrap();
        assert_eq!(residency(tile(64), &large), Some((3, 2)));
        assert_eq!(residency(tile(64), &middle), Some((4, 1)));
        assert_eq!(residency(tile(32), &middle), Some((5, 2)));
        assert_eq!(residency(tile(64), &small), Some((3, 1)));
        assert_eq!(residency(tile(32), &small), Some((3, 2)));
        let tiny = device("16 KB", (8, 0), 1, 16);
        assert_eq!(plan(forward(128, 128, 128), finish(Kind::Store), &tiny), None);
    }

    #[test]
    fn groups_are_nearly_square() {
        let [_, _, large] = devices();
        let wide = chosen(&large, Kind::Store, Shape { layout: Layout::Nt, m: 65_536, n: 24_576, k: 6144 });
        let (_, resident) = residency(wide.tile, &large).unwrap();
        let columns = wide.group * wide.tile.n;
        let rows = (large.multiprocessors * resident).div_ceil(wide.group) * wide.tile.m;
        assert!(columns < 2 * rows && rows < 2 * columns, "{columns} x {rows}");
    }
}
