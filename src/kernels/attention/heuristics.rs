//! Which images are short, and what the launches need: pure functions of head dim and device.

use super::instances::{BLOCKS, HOPPER_SHARED_BYTES, Instance, WARPS};
use crate::device::DeviceInfo;

/// Lengths are binned by this many rows: limits are multiples of it.
const BIN: usize = 16;
/// Longest image that a limit may call short: longer ones share the last bin.
const MAX_LIMIT: usize = 1022 * BIN;
/// Shared memory that the hardware keeps for itself in every block.
const RESERVED: usize = 1024;

/// Which images go to which list, as `kernels/attention/schedule.cuh` describes them. Forward and backward
/// have limits of their own, and so a schedule each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest short image, a multiple of 16.
    pub short: usize,
    /// Longest image whose heads have half a block each, a multiple of 16, at most `short`.
    pub half: usize,
    /// Longest image whose heads have a quarter of a block each, a multiple of 16, at most `half`.
    pub quarter: usize,
    /// Query rows of an item of a long image.
    pub tile_rows: usize,
}

impl Limits {
    /// Limits with at most `short` rows for short images, rounded down to what the lists can tell apart.
    pub fn new(short: usize, half: usize, quarter: usize, tile_rows: usize) -> Self {
        let round = |rows: usize, most: usize| rows.min(most) / BIN * BIN;
        let short = round(short, MAX_LIMIT);
        let half = round(half, short);
        Self { short, half, quarter: round(quarter, half), tile_rows }
    }

    /// Most items of long images in `tokens` rows and `slots` images, of one head.
    pub fn long_items(&self, tokens: usize, slots: usize) -> usize {
        let images = slots.min(tokens / (self.short + 1));
        if images == 0 { 0 } else { tokens / self.tile_rows + images }
    }

    /// 32-bit words of the schedule.
    pub fn words(&self, tokens: usize, slots: usize) -> usize {
        8 + slots + 2 * self.long_items(tokens, slots)
    }
}

/// How the forward pass runs a head dim on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardPlan {
    /// The kernels.
    pub instance: Instance,
    /// Which images are short.
    pub limits: Limits,
    /// Bytes of shared memory of a block of the short schedule; on Hopper, of every block.
    pub short_shared: u32,
    /// Bytes of shared memory of a block of the long schedule, which Hopper's kernels have no launch for.
    pub long_shared: u32,
    /// Blocks that the device runs at a time: what grids are made for.
    pub blocks: u32,
    /// Whether Hopper's warpgroups take turns at the tensor cores where an image is long.
    pub turns: bool,
    /// Whether Hopper's blocks share the keys and values of long images, two and two: an item of a long image is as many
    /// rows as both take. See [`with_pairs`](Self::with_pairs).
    pub pairs: bool,
}

impl ForwardPlan {
    /// The plan for a head dim; none where no kernel serves it, or a block's shared memory is too small. On Hopper it is
    /// Hopper's.
    ///
    /// Short images are those whose keys and values fit the shared memory of a block: on Hopper of the one that there is
    /// on a multiprocessor, else while two blocks fit it, of which one loads and normalises while the other multiplies.
    pub fn new(head_dim: usize, device: &DeviceInfo) -> Option<Self> {
        Self::plans(head_dim, device).into_iter().next()
    }

    /// All plans for a head dim, first the one to take without measuring.
    pub fn plans(head_dim: usize, device: &DeviceInfo) -> Vec<Self> {
        let hopper = Instance::hopper_of(head_dim)
            .filter_map(|instance| Self::with_short_limit(instance, usize::MAX, device))
            .flat_map(|plan| [plan, Self { turns: false, ..plan }, plan.with_pairs(!plan.pairs)]);
        hopper.chain(Self::portable(head_dim, device)).collect()
    }

    /// Whether images of `tokens` rows in `slots` slots, none longer than `longest`, may be long.
    pub fn may_be_long(&self, tokens: usize, slots: usize, longest: usize) -> bool {
        longest > self.limits.short && self.limits.long_items(tokens, slots) > 0
    }

    /// Whether the keys of long images are normalised and rotated by a launch of their own, into workspace: where there is
    /// a norm or a rotation, `normed`, and the kernel is Hopper's.
    pub fn normalises_before(&self, normed: bool, tokens: usize, slots: usize, longest: usize) -> bool {
        self.instance.hopper.is_some() && normed && self.may_be_long(tokens, slots, longest)
    }

    /// The plan with the kernels of every GPU.
    pub fn portable(head_dim: usize, device: &DeviceInfo) -> Option<Self> {
        let instance = Instance::of(head_dim)?;
        let (block, multiprocessor) =
            (device.shared_per_block as usize, device.shared_per_multiprocessor as usize);
        let bytes = (multiprocessor / BLOCKS as usize).saturating_sub(RESERVED).min(block);
        Self::with_short_limit(instance, bytes / row_bytes(instance), device)
    }

    /// The same with blocks in pairs or each by itself, and the limits of that, where it is one of Hopper's.
    pub fn with_pairs(self, pairs: bool) -> Self {
        let Some(warpgroups) = self.instance.hopper else { return self };
        let tile_rows = 64 * warpgroups * if pairs { 2 } else { 1 };
        Self { pairs, limits: Limits { tile_rows, ..self.limits }, ..self }
    }

    /// The same with another longest short image, for measuring and testing. On Hopper it is no longer than the ring.
    ///
    /// There blocks of two warpgroups are in pairs, those of three are not. That is a guess, not measured: for every
    /// byte of keys and values a tile makes as many operations as it has rows, so at the full rate of the tensor cores,
    /// 4,096 a clock, each multiprocessor reads 32 bytes of L2 a clock for tiles of 128 rows and 21 for tiles of 192.
    pub fn with_short_limit(instance: Instance, short: usize, device: &DeviceInfo) -> Option<Self> {
        if let Some(warpgroups) = instance.hopper {
            if !device.hopper || device.shared_per_block < HOPPER_SHARED_BYTES {
                return None;
            }
            let ring = hopper_stages(instance.width, warpgroups) * instance.keys;
            let plan = Self {
                instance,
                limits: Limits::new(short.min(ring), 0, 0, 64 * warpgroups),
                short_shared: HOPPER_SHARED_BYTES,
                long_shared: HOPPER_SHARED_BYTES,
                blocks: device.multiprocessors,
                turns: true,
                pairs: false,
            };
            return Some(plan.with_pairs(warpgroups == 2));
        }
        let tile_rows = WARPS * instance.rows;
        let limits = Limits::new(short, 2 * instance.rows, instance.rows, tile_rows);
        // Heads that share a block hold as many rows together as its warps have query rows.
        let short_shared = limits.short.max(tile_rows) * row_bytes(instance);
        let long_shared = 2 * instance.keys * row_bytes(instance);
        let fits = |bytes: usize| u32::try_from(bytes).ok().filter(|&b| b <= device.shared_per_block);
        Some(Self {
            instance,
            limits,
            short_shared: fits(short_shared)?,
            long_shared: fits(long_shared)?,
            blocks: BLOCKS * device.multiprocessors,
            turns: false,
            pairs: false,
        })
    }
}

/// Stages of the ring of Hopper's kernel, `STAGES` there: 64 keys and values each, whose planes of 8 columns are 16 bytes
/// longer than their rows, beside mbarriers, what the tails of images need, and zeros where a head is an odd number of
/// planes.
fn hopper_stages(width: usize, warpgroups: usize) -> usize {
    let stage = 2 * (width / 8) * (64 * 16 + 16);
    let zeros = if width.is_multiple_of(16) { 0 } else { 64 * 16 };
    (HOPPER_SHARED_BYTES as usize - zeros - 320 - warpgroups * 768) / stage
}

/// Bytes of a key and a value.
fn row_bytes(instance: Instance) -> usize {
    2 * instance.width * 2
}

#[cfg(test)]
mod tests {
    use super::super::instances::INSTANCES;
    use super::*;

    fn device(shared_per_block: u32, shared_per_multiprocessor: u32) -> DeviceInfo {
        DeviceInfo {
            name: "test".into(),
            capability: (8, 0),
            hopper: false,
            multiprocessors: 100,
            shared_per_block: shared_per_block << 10,
            shared_per_multiprocessor: shared_per_multiprocessor << 10,
            l2_bytes: 0,
            memory_bytes: 0,
            clock_khz: 0,
            driver: None,
        }
    }

    #[test]
    fn short_limits_of_real_devices() {
        // Widths 64, 72, 80, 88, 96, 104, 112, 128.
        let cases = [
            (device(99, 100), [192, 160, 144, 128, 128, 112, 112, 96]),
            (device(163, 164), [320, 288, 256, 224, 208, 192, 176, 160]),
            (device(227, 228), [448, 400, 352, 320, 288, 272, 256, 224]),
        ];
        for (device, expected) in cases {
            for (instance, short) in INSTANCES.iter().zip(expected) {
                let plan = ForwardPlan::new(instance.width, &device).unwrap();
                assert_eq!(plan.limits.short, short, "{device:?} {instance:?}");
                assert!(plan.short_shared <= device.shared_per_block);
                let two = BLOCKS * (plan.short_shared + RESERVED as u32);
                assert!(two <= device.shared_per_multiprocessor, "{plan:?}");
                assert!(plan.limits.quarter <= plan.limits.half && plan.limits.half <= plan.limits.short);
                assert_eq!(plan.blocks, 200);
            }
        }
    }

    #[test]
    fn other_head_dims_run_on_the_next_width() {
        let device = device(227, 228);
        let width = |head_dim| ForwardPlan::new(head_dim, &device).map(|plan| plan.instance.width);
        assert_eq!([8, 64, 120, 128].map(width), [Some(64), Some(64), Some(128), Some(128)]);
        assert_eq!([0, 12, 100, 136].map(width), [None; 4]);
        assert_eq!(ForwardPlan::new(64, &DeviceInfo { shared_per_block: 16 << 10, ..device }), None);
    }

    /// What the ring holds is short; the second number is that of the alternative with two warpgroups.
    #[test]
    fn short_limits_of_hopper() {
        let device = DeviceInfo::h100();
        let cases = [
            (64, &[832, 832][..]),
            (72, &[768, 768]),
            (80, &[704, 704]),
            (88, &[640]),
            (96, &[576]),
            (104, &[512]),
            (112, &[448]),
            (128, &[384]),
        ];
        for (width, expected) in cases {
            let plans = ForwardPlan::plans(width, &device);
            assert_eq!(Some(plans[0]), ForwardPlan::new(width, &device));
            let (portable, hopper) = plans.split_last().unwrap();
            assert_eq!(Some(*portable), ForwardPlan::portable(width, &device));
            let shorts: Vec<usize> = hopper.iter().step_by(3).map(|plan| plan.limits.short).collect();
            assert_eq!(shorts, expected, "width {width}");
            for three in hopper.chunks(3) {
                let pairs = three[0].instance.hopper == Some(2);
                let found: Vec<_> =
                    three.iter().map(|plan| (plan.instance, plan.turns, plan.pairs)).collect();
                let instance = three[0].instance;
                let wanted = [(true, pairs), (false, pairs), (true, !pairs)];
                assert_eq!(found, wanted.map(|(turns, pairs)| (instance, turns, pairs)));
            }
            for plan in hopper {
                let rows = |pairs| 64 * plan.instance.hopper.unwrap() * if pairs { 2 } else { 1 };
                let (rows, all_rows) = (rows(plan.pairs), rows(plan.instance.hopper == Some(2)));
                assert_eq!((plan.limits.half, plan.limits.quarter, plan.limits.tile_rows), (0, 0, rows));
                assert!(
                    plan.short_shared <= device.shared_per_block && plan.blocks == device.multiprocessors
                );
                let all = ForwardPlan::with_short_limit(plan.instance, 0, &device).unwrap();
                assert_eq!((all.limits.short, all.limits.tile_rows), (0, all_rows));
            }
        }
        let smaller = DeviceInfo { shared_per_block: 163 << 10, ..device.clone() };
        assert_eq!(ForwardPlan::new(64, &smaller).unwrap().instance.hopper, None);
        let other = DeviceInfo { hopper: false, ..device };
        assert_eq!(ForwardPlan::plans(64, &other).len(), 1);
    }

    #[test]
    fn any_batch_fits_the_lists() {
        for short in [0, 16, 64, 448] {
            let limits = Limits::new(short, 64, 32, 64);
            for lengths in [&[1; 40][..], &[17; 9], &[65, 0, 63, 64, 1, 449, 512], &[4096], &[0; 5], &[]] {
                let tokens = lengths.iter().sum();
                let long = lengths.iter().filter(|&&length| length > limits.short);
                let items: usize = long.map(|length: &usize| length.div_ceil(64)).sum();
                assert!(items <= limits.long_items(tokens, lengths.len()), "{limits:?} {lengths:?}");
            }
        }
        let limits = Limits::new(1 << 20, 100, 200, 64);
        assert_eq!(limits, Limits { short: 16_352, half: 96, quarter: 96, tile_rows: 64 });
    }
}
