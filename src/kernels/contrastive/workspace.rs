//! What the kernels hold between launches, and over how many blocks they share out a row: pure functions of sizes.

use crate::device::Ptr;

/// Widest vectors.
pub const MAX_WIDTH: usize = 1 << 16;
/// Most splits: each holds gradients of its own.
pub const MAX_SPLITS: usize = 4;

/// Rows of a tile of a block, and vectors that meet it at a time.
pub(super) const OWN: usize = 64;
const OTHER: usize = 128;
/// Blocks that fill a device, about.
const BLOCKS: usize = 256;
/// Elements to which each part is aligned: 16 bytes.
const UNIT: usize = 4;

/// Sizes of the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Pairs N.
    pub pairs: usize,
    /// Columns D.
    pub width: usize,
}

impl Workspace {
    /// Parts of the other side that blocks of their own go over.
    pub fn splits(&self) -> usize {
        let blocks = 2 * self.pairs.div_ceil(OWN).max(1);
        (BLOCKS / blocks).clamp(1, MAX_SPLITS.min(self.pairs.div_ceil(OTHER).max(1)))
    }

    /// Elements of 4 bytes: lengths, partial statistics, scores, log-sums, ranks, sums, gradients, the number of pairs.
    fn parts(&self) -> [usize; 8] {
        let Self { pairs, width } = *self;
        let splits = self.splits();
        [
            2 * pairs,
            2 * splits * pairs * 2,
            pairs,
            2 * pairs,
            splits * pairs,
            splits * pairs.div_ceil(OWN) * 2,
            2 * splits * pairs * width,
            1,
        ]
    }

    /// Bytes: of order N·D, whatever the number of scores.
    pub fn bytes(&self) -> usize {
        self.parts().iter().map(|part| 4 * part.next_multiple_of(UNIT)).sum()
    }

    /// Where each part begins in a workspace.
    pub(super) fn addresses(&self, workspace: Ptr<u8>) -> [Ptr<u8>; 8] {
        let mut at = 0;
        self.parts().map(|part| {
            let begin = workspace.offset(at);
            at += 4 * part.next_multiple_of(UNIT);
            begin
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_fill_a_device_and_no_more() {
        let splits = |pairs| Workspace { pairs, width: 64 }.splits();
        assert_eq!([1, 128, 129, 512, 2048, 8192, 1 << 20].map(splits), [1, 1, 2, 4, 4, 1, 1]);
    }

    /// Four times the pairs hold no more than four times as much for each split: no matrix of scores.
    #[test]
    fn workspace_grows_with_pairs_not_with_scores() {
        let bytes = |pairs| Workspace { pairs, width: 768 }.bytes();
        for pairs in [64, 500, 4096, 32768] {
            assert!(bytes(4 * pairs) <= 4 * MAX_SPLITS * bytes(pairs));
            assert!(bytes(pairs) <= 4 * (2 * MAX_SPLITS * pairs * 768 + 32 * pairs) + 128);
        }
        let scores = 4 * 32768 * 32768;
        assert!(bytes(32768) < scores / 10, "{}", bytes(32768));
    }
}
