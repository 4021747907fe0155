//! What the backward pass keeps between its launches, and where: pure functions of plan and sizes.

use half::bf16;

use super::super::instances::HOPPER_BACKWARD_QUERIES;
use super::plan::BackwardPlan;
use crate::device::Ptr;
use crate::kernels::Element;

/// What a backward pass is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardSizes {
    /// Token rows.
    pub tokens: usize,
    /// Image slots.
    pub slots: usize,
    /// Heads of q.
    pub heads: usize,
    /// Heads of k and v.
    pub kv_heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Most rows of an image, as the schedule was promised.
    pub longest: usize,
    /// Whether q and k are normalised.
    pub norm: bool,
    /// Whether they are rotated.
    pub rope: bool,
    /// Whether gradients of gains or biases are wanted, which are those of a norm.
    pub affine: bool,
}

/// Parts of the workspace, by element or byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Bytes of all.
    pub bytes: usize,
    /// Blocks of the main launch.
    pub blocks: usize,
    /// Blocks of the launch that finishes dq of long images; none where there are none.
    pub finish_blocks: usize,
    /// Rows of the partial sums of gains and biases.
    pub partial_rows: usize,
    /// Counters of turns, one a tile of queries and head.
    pub turns: usize,
    /// Elements of dk, and of dv, of all heads of q, where these share heads of k and v; else none.
    groups: usize,
    groups_at: usize,
    partial_at: usize,
    q_norm_at: usize,
    k_norm_at: usize,
    dq_sum_at: usize,
    turns_at: usize,
}

/// Where those parts lie that Hopper's kernel has for long images; null where there are none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LongParts<E: Element = bf16> {
    /// q̂, `[tokens, heads·head_dim]`, where there is a norm or a rotation.
    pub q_norm: Ptr<E>,
    /// k̂, `[tokens, kv_heads·head_dim]`, likewise.
    pub k_norm: Ptr<E>,
    /// Sums of dq, `[tile, head]` of 64 rows of the kernel's width each.
    pub dq_sum: Ptr<f32>,
    /// Turns, `[tile, head]`.
    pub turns: Ptr<i32>,
}

impl BackwardPlan {
    /// The workspace of a pass: delta of long images, `[tokens, heads]`; the sums of the blocks where gradients of gains
    /// or biases are wanted; dk and dv of each head of q where these share heads; and, for long images on Hopper,
    /// normalised or rotated rows and the sums of dq.
    pub fn workspace(&self, sizes: &BackwardSizes) -> Workspace {
        let BackwardSizes { tokens, slots, heads, kv_heads, head_dim, longest, norm, rope, affine } = *sizes;
        let hopper = self.instance.hopper;
        let tiles = self.limits.long_items(tokens, slots) * self.limits.tile_rows / HOPPER_BACKWARD_QUERIES;
        let is_long = hopper && longest > self.limits.short && tiles > 0;
        let blocks = self.grid(tokens, slots, heads);
        let finish_blocks = if is_long { blocks } else { 0 };
        // Each of two warpgroups of a block of Hopper's kernels has sums of its own.
        let partial_rows = if hopper { 2 * (blocks + finish_blocks) } else { blocks };
        let mut bytes = 0;
        let mut part = |wanted: bool, size: usize| {
            let at = bytes;
            bytes += if wanted { size.next_multiple_of(16) } else { 0 };
            at
        };
        part(is_long || !hopper, tokens * heads * size_of::<f32>());
        let partial_at = part(affine && norm, partial_rows * heads * 4 * head_dim * size_of::<f32>());
        let groups = if kv_heads < heads { tokens * heads * head_dim } else { 0 };
        let groups_at = part(groups > 0, 2 * groups * size_of::<bf16>());
        let makes_rows = is_long && (norm || rope);
        let q_norm_at = part(makes_rows, tokens * heads * head_dim * size_of::<bf16>());
        let k_norm_at = part(makes_rows, tokens * kv_heads * head_dim * size_of::<bf16>());
        let turns = if is_long { tiles * heads } else { 0 };
        let tile = HOPPER_BACKWARD_QUERIES * self.instance.width;
        let dq_sum_at = part(is_long, turns * tile * size_of::<f32>());
        let turns_at = part(is_long, turns * size_of::<i32>());
        Workspace {
            bytes,
            blocks,
            finish_blocks,
            partial_rows,
            turns,
            groups,
            groups_at,
            partial_at,
            q_norm_at,
            k_norm_at,
            dq_sum_at,
            turns_at,
        }
    }
}

impl Workspace {
    /// Sums of gains and biases in a workspace at `base`, which is aligned to 16 bytes.
    pub fn partial(&self, base: Ptr<u8>) -> Ptr<f32> {
        base.offset(self.partial_at).cast()
    }

    /// dk and dv of all heads of q, `[tokens, heads·head_dim]` each, where these share heads of k and v.
    pub fn groups<E: Element>(&self, base: Ptr<u8>) -> Option<[Ptr<E>; 2]> {
        let first = base.offset(self.groups_at).cast();
        (self.groups > 0).then(|| [first, first.offset(self.groups)])
    }

    /// The parts for long images.
    pub fn long<E: Element>(&self, base: Ptr<u8>) -> LongParts<E> {
        let part = |at| if self.turns > 0 { base.offset(at) } else { Ptr::null() };
        let norm = |at| if self.k_norm_at > self.q_norm_at { part(at).cast() } else { Ptr::null() };
        LongParts {
            q_norm: norm(self.q_norm_at),
            k_norm: norm(self.k_norm_at),
            dq_sum: part(self.dq_sum_at).cast(),
            turns: part(self.turns_at).cast(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceInfo;

    const SIZES: BackwardSizes = BackwardSizes {
        tokens: 1000,
        slots: 3,
        heads: 4,
        kv_heads: 4,
        head_dim: 64,
        longest: 1000,
        norm: true,
        rope: false,
        affine: true,
    };

    #[test]
    fn of_every_gpu() {
        let device = DeviceInfo { hopper: false, ..DeviceInfo::h100() };
        let plan = BackwardPlan::new(64, &device).unwrap();
        let delta = 1000 * 4 * 4;
        let blocks = plan.grid(1000, 3, 4);
        for (norm, affine) in [(false, false), (true, false), (false, true)] {
            assert_eq!(plan.workspace(&BackwardSizes { norm, affine, ..SIZES }).bytes, delta);
        }
        let all = plan.workspace(&SIZES);
        assert_eq!((all.bytes, all.partial_rows), (delta + blocks * 4 * 4 * 64 * 4, blocks));
        assert_eq!(all.long::<bf16>(Ptr::from_raw(16)).turns.address(), 0);
    }

    #[test]
    fn of_hopper() {
        let plan = BackwardPlan::new(64, &DeviceInfo::h100()).unwrap();
        let short = plan.workspace(&BackwardSizes { longest: 256, ..SIZES });
        assert_eq!((short.blocks, short.finish_blocks, short.partial_rows), (52, 0, 104));
        assert_eq!(short.bytes, 104 * 4 * 4 * 64 * 4);
        assert_eq!(plan.workspace(&BackwardSizes { longest: 256, affine: false, ..SIZES }).bytes, 0);

        // 10 tiles of keys at most.
        let long = plan.workspace(&SIZES);
        assert_eq!((long.blocks, long.finish_blocks, long.partial_rows, long.turns), (52, 52, 208, 20 * 4));
        let (delta, rows, sums) = (1000 * 4 * 4, 1000 * 4 * 64 * 2, 80 * 64 * 64 * 4);
        let partial = 208 * 4 * 4 * 64 * 4;
        assert_eq!(long.bytes, delta + partial + 2 * rows + sums + 80 * 4);
        let parts = long.long::<bf16>(Ptr::from_raw(1 << 20));
        let at =
            [parts.q_norm.address(), parts.k_norm.address(), parts.dq_sum.address(), parts.turns.address()];
        let q_norm = (1 << 20) + (delta + partial) as u64;
        let rows = rows as u64;
        assert_eq!(at, [q_norm, q_norm + rows, q_norm + 2 * rows, q_norm + 2 * rows + sums as u64]);

        let plain = plan.workspace(&BackwardSizes { norm: false, ..SIZES });
        assert_eq!(plain.bytes, delta + sums + 80 * 4);
        assert!(plain.long::<bf16>(Ptr::from_raw(1 << 20)).q_norm.is_null());
        let rotated = plan.workspace(&BackwardSizes { norm: false, rope: true, ..SIZES });
        assert_eq!(rotated.bytes, plain.bytes + 2 * rows as usize);
        assert!(!rotated.long::<bf16>(Ptr::from_raw(1 << 20)).k_norm.is_null());
    }

    /// dk and dv of every head of q are kept apart until they are summed; k̂ has fewer heads.
    #[test]
    fn of_grouped_heads() {
        let (hopper, rows) = (DeviceInfo::h100(), 1000 * 4 * 64 * 2);
        for device in [DeviceInfo { hopper: false, ..hopper.clone() }, hopper] {
            let plan = BackwardPlan::new(64, &device).unwrap();
            let all = plan.workspace(&SIZES);
            assert_eq!(all.groups::<bf16>(Ptr::from_raw(1 << 20)), None);
            let grouped = plan.workspace(&BackwardSizes { kv_heads: 2, ..SIZES });
            let saved = if device.hopper { rows / 2 } else { 0 };
            assert_eq!(grouped.bytes, all.bytes + 2 * rows - saved);
            let [dk, dv] = grouped.groups::<bf16>(Ptr::from_raw(1 << 20)).unwrap();
            assert_eq!(dv.address(), dk.address() + rows as u64);
            let end = dv.address() + rows as u64;
            let long = grouped.long::<bf16>(Ptr::from_raw(1 << 20));
            assert_eq!(
                end,
                if device.hopper { long.q_norm.address() } else { (1 << 20) + grouped.bytes as u64 }
            );
        }
    }
}
