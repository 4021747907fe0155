//! Into how many slices the gradients cut the tokens.

/// Blocks that a multiprocessor should have of the tables' gradients: each holds 32 KB of shared memory.
pub(super) const TABLE_BLOCKS: usize = 6;
/// Blocks that a multiprocessor should have of the Fourier map's gradient.
pub(super) const FOURIER_BLOCKS: usize = 16;
/// Fewest tokens of a slice: its sums are written once and read once, as much as this many rows of bf16 for a
/// table of 64 rows.
const FEWEST: usize = 256;

/// Slices of the tokens of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slices {
    /// Tokens of a slice, a multiple of 32.
    pub tokens: usize,
    /// How many.
    pub count: usize,
}

/// As many slices of `tokens` as give each of `multiprocessors` `wanted` blocks, where a slice has `blocks`.
pub fn slices(tokens: usize, blocks: usize, multiprocessors: usize, wanted: usize) -> Slices {
    let count = (multiprocessors * wanted).div_ceil(blocks.max(1)).clamp(1, tokens.div_ceil(FEWEST).max(1));
    let each = tokens.div_ceil(count).next_multiple_of(32).max(32);
    Slices { tokens: each, count: tokens.div_ceil(each).max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_the_tokens_and_fill_the_device() {
        // ViT-B with two tables of 64 rows on 132 multiprocessors.
        assert_eq!(slices(65_536, 6, 132, TABLE_BLOCKS), Slices { tokens: 512, count: 128 });
        // A joint table of 64x64: one tile of it is enough for a slice to fill the device.
        assert_eq!(slices(65_536, 6 * 64, 132, TABLE_BLOCKS), Slices { tokens: 21_856, count: 3 });
        assert_eq!(slices(128, 1, 132, TABLE_BLOCKS), Slices { tokens: 128, count: 1 });
        for tokens in [1, 31, 32, 257, 5000] {
            let slices = slices(tokens, 3, 20, FOURIER_BLOCKS);
            assert!(slices.count * slices.tokens >= tokens && (slices.count - 1) * slices.tokens < tokens);
            assert!(slices.tokens.is_multiple_of(32));
        }
    }
}
