//! Which images are short for the backward pass, and what its launches need: pure functions of head dim,
//! device and sizes.

use super::super::heuristics::Limits;
use super::super::instances::{
    BACKWARD_INSTANCES, BACKWARD_WARPS, BackwardInstance, HOPPER_BACKWARD_INSTANCES, HOPPER_BACKWARD_KEYS,
    HOPPER_BACKWARD_QUERIES, HOPPER_BACKWARD_SHARED, Instance,
};
use crate::device::DeviceInfo;

/// Rows of the streamed side that are taken between two barriers; rows of a group are multiples of it.
const STEP: usize = 32;
/// Such steps that are in shared memory at a time where an image is long.
const STAGES: usize = 3;
/// What a block keeps in front of its tiles.
const HEADER: usize = BACKWARD_WARPS * 32;
/// lse and delta of a query.
const QUERY: usize = 2 * size_of::<f32>();
/// Places of a key in two steps of dS.
const KEY: usize = 2 * STEP * 2;

/// How the backward pass runs a head dim on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardPlan {
    /// The kernel.
    pub instance: BackwardInstance,
    /// Which images are short; the items of long ones are tiles of keys, and of queries.
    pub limits: Limits,
    /// Rows of short images that fit a block together, a multiple of 32: those of two or four heads share them.
    pub short_rows: usize,
    /// Bytes of shared memory of a block.
    pub shared: u32,
    /// Blocks that the device runs at a time: what the grid is made for. Key blocks of a long image wait for each other
    /// on Hopper, so it may not be more there: on the emulator, no more than its resident blocks.
    pub blocks: u32,
}

impl BackwardPlan {
    /// The plan for a head dim; none where no kernel serves it, or a block's shared memory is too small.
    pub fn new(head_dim: usize, device: &DeviceInfo) -> Option<Self> {
        Self::plans(head_dim, device).first().copied()
    }

    /// All plans for a head dim, the one that [`new`](Self::new) takes first: Hopper's kernel where there is one, then
    /// that of every GPU.
    pub fn plans(head_dim: usize, device: &DeviceInfo) -> Vec<Self> {
        let Some(Instance { width, .. }) = Instance::of(head_dim) else { return Vec::new() };
        (HOPPER_BACKWARD_INSTANCES.into_iter().chain(BACKWARD_INSTANCES))
            .filter(|instance| instance.width == width)
            .filter_map(|instance| Self::with_short_limit(instance, usize::MAX, device))
            .collect()
    }

    /// The same with a longest short image of at most `short` rows, for measuring and testing.
    ///
    /// A short image has q, k, v and dout in shared memory, and a warp for every
    /// [`rows`](BackwardInstance::rows) keys of a head. A quarter of the block shares a quarter of
    /// its shared memory.
    pub fn with_short_limit(instance: BackwardInstance, short: usize, device: &DeviceInfo) -> Option<Self> {
        if instance.hopper {
            return Self::hopper(instance, short, device);
        }
        let rows = instance.rows;
        let most = BACKWARD_WARPS * rows;
        let available = (device.shared_per_block as usize).checked_sub(HEADER)?;
        let fitting = |bytes: usize, of_row: usize| bytes / of_row / STEP * STEP;
        let capacity = fitting(available, 2 * pair(instance) + QUERY + KEY).min(most);
        let part = |parts: usize| fitting(capacity / parts, 1).min(short);
        let ring = STAGES * STEP * (pair(instance) + QUERY);
        let tile_rows = fitting(available.checked_sub(ring)?, pair(instance) + QUERY).min(most);
        if capacity == 0 || tile_rows == 0 {
            return None;
        }
        let limits = Limits::new(part(1), part(2), part(4), tile_rows);
        let short_bytes = capacity * (2 * pair(instance) + QUERY + KEY);
        let long_bytes = tile_rows * (pair(instance) + QUERY) + ring;
        Some(Self {
            instance,
            limits,
            short_rows: capacity,
            shared: u32::try_from(HEADER + short_bytes.max(long_bytes)).ok()?,
            blocks: device.multiprocessors,
        })
    }

    /// A block of Hopper's kernel has a multiprocessor to itself. Two heads of an image that fits a query stage share a
    /// block.
    fn hopper(instance: BackwardInstance, short: usize, device: &DeviceInfo) -> Option<Self> {
        if !device.hopper || device.shared_per_block < HOPPER_BACKWARD_SHARED {
            return None;
        }
        let limits =
            Limits::new(short.min(instance.hopper_short()), HOPPER_BACKWARD_QUERIES, 0, HOPPER_BACKWARD_KEYS);
        Some(Self {
            instance,
            limits,
            short_rows: limits.short,
            shared: HOPPER_BACKWARD_SHARED,
            blocks: device.multiprocessors,
        })
    }

    /// Blocks of the grid: no more than there can be items. The same for every batch of one size.
    pub fn grid(&self, tokens: usize, slots: usize, heads: usize) -> usize {
        // Tiles of keys; and of queries, for the kernel of every GPU.
        let sides = if self.instance.hopper { 1 } else { 2 };
        let items = slots.saturating_add(sides * self.limits.long_items(tokens, slots)).saturating_mul(heads);
        items.clamp(1, self.blocks.max(1) as usize)
    }
}

/// Bytes of a row of q and one of dout, or of k and v.
fn pair(instance: BackwardInstance) -> usize {
    2 * instance.width * 2
}

#[cfg(test)]
mod tests {
    use super::super::super::instances::BACKWARD_INSTANCES;
    use super::*;

    fn device(shared_per_block: u32) -> DeviceInfo {
        DeviceInfo {
            name: "test".into(),
            capability: (8, 0),
            hopper: false,
            multiprocessors: 100,
            shared_per_block: shared_per_block << 10,
            shared_per_multiprocessor: (shared_per_block + 1) << 10,
            l2_bytes: 0,
            memory_bytes: 0,
            clock_khz: 0,
            driver: None,
        }
    }

    #[test]
    fn limits_of_real_devices() {
        // Widths 64, 72, 80, 88, 96, 104, 112, 128: short images, and rows of a tile of a long one.
        let cases = [
            (99, [128, 128, 128, 96, 96, 96, 96, 64], [256, 224, 192, 160, 128, 128, 96, 96]),
            (163, [256, 224, 192, 192, 128, 128, 128, 128], [256, 256, 256, 256, 128, 128, 128, 128]),
            (227, [256, 256, 256, 256, 128, 128, 128, 128], [256, 256, 256, 256, 128, 128, 128, 128]),
        ];
        for (shared, short, tile_rows) in cases {
            let device = device(shared);
            for (i, instance) in BACKWARD_INSTANCES.iter().enumerate() {
                let plan = BackwardPlan::new(instance.width, &device).unwrap();
                assert_eq!((plan.limits.short, plan.limits.tile_rows), (short[i], tile_rows[i]), "{plan:?}");
                assert!(plan.shared <= device.shared_per_block, "{plan:?}");
            }
        }
    }

    /// A group of warps has a warp for all its keys, and all groups of a block have room.
    #[test]
    fn heads_that_share_a_block_fit() {
        for shared in [99, 163, 227] {
            for instance in BACKWARD_INSTANCES {
                let plan = BackwardPlan::new(instance.width, &device(shared)).unwrap();
                let row = 2 * pair(instance) + QUERY + KEY;
                let limits = plan.limits;
                for (rows, groups) in [(limits.short, 1), (limits.half, 2), (limits.quarter, 4)] {
                    assert!(rows <= BACKWARD_WARPS / groups * instance.rows, "{plan:?}");
                    assert!(HEADER + groups * rows * row <= plan.shared as usize, "{plan:?}");
                }
            }
        }
    }

    #[test]
    fn grids_and_workspaces() {
        let plan = BackwardPlan::new(64, &device(227)).unwrap();
        assert_eq!(plan.grid(4096, 0, 4), 1);
        assert_eq!(plan.grid(256, 3, 4), 12);
        assert_eq!(plan.grid(1 << 20, 1 << 10, 4), 100);
        assert_eq!(BackwardPlan::new(64, &device(32)), None);
        assert_eq!(BackwardPlan::new(136, &device(227)), None);
    }

    #[test]
    fn plans_for_hopper() {
        let hopper = DeviceInfo::h100();
        for (i, short) in [256, 256, 256, 192, 192, 128, 128, 128].into_iter().enumerate() {
            let width = HOPPER_BACKWARD_INSTANCES[i].width;
            let [plan, portable] = BackwardPlan::plans(width, &hopper)[..] else { panic!("{width}") };
            assert_eq!(BackwardPlan::new(width, &hopper), Some(plan));
            assert!(plan.instance.hopper && !portable.instance.hopper);
            assert_eq!(plan.limits, Limits::new(short, 64, 0, 128));
            assert!(plan.shared <= hopper.shared_per_block);
            let long = BackwardPlan::with_short_limit(plan.instance, 0, &hopper).unwrap();
            assert_eq!(long.limits, Limits::new(0, 0, 0, 128));
        }
        let small = DeviceInfo { shared_per_block: 163 << 10, ..DeviceInfo::h100() };
        for device in [DeviceInfo { hopper: false, ..DeviceInfo::h100() }, small] {
            assert!(BackwardPlan::plans(72, &device).iter().all(|plan| !plan.instance.hopper));
        }
    }
}
