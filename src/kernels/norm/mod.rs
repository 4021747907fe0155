//! LayerNorm and RMSNorm of packed rows, alone or fused with the residual connection before them.
//!
//! A row lies in the registers of one warp or of a few, so every operand is read once; see
//! `kernels/norm/norm.cuh`. The backward pass runs on a persistent grid whose blocks each leave a row of partial
//! sums of the parameters' gradients; the sums are added up in order, so the same device gives the same bits.

mod checked;
mod raw;

pub use checked::{Norm, NormBackward, NormForward};
pub use raw::{
    BackwardParams, ForwardParams, SumsParams, backward_workspace_bytes, launch_backward, launch_forward,
    launch_sums, partial_rows,
};

pub use super::registry::norm as instances;

use instances::{BACKWARD, Backward, FORWARD, Forward};

/// Widest row, in elements.
pub const MAX_WIDTH: usize = 8192;

/// The kernel of the forward pass for rows of `width` elements.
pub fn forward_variant(width: usize) -> Forward {
    let fits = FORWARD.iter().find(|variant| width <= variant.widest());
    *fits.unwrap_or(&FORWARD[FORWARD.len() - 1])
}

/// The kernel of the backward pass for rows of `width` elements.
pub fn backward_variant(width: usize) -> Backward {
    let fits = BACKWARD.iter().find(|variant| width <= variant.widest());
    *fits.unwrap_or(&BACKWARD[BACKWARD.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_has_a_kernel_that_it_fills_by_half() {
        for width in (8..=MAX_WIDTH).step_by(8) {
            let (forward, backward) = (forward_variant(width), backward_variant(width));
            assert!(forward.widest() >= width && backward.widest() >= width, "{width}");
            let wasteful = 2 * width.max(256);
            assert!(forward.widest() < wasteful && backward.widest() < wasteful, "{width}");
        }
        for (width, chunks) in [(192, 1), (384, 2), (768, 3), (1024, 4), (1152, 5), (1408, 6), (1664, 7)] {
            assert_eq!((forward_variant(width).chunks, forward_variant(width).warps), (chunks, 1));
            assert_eq!(backward_variant(width).warps, chunks);
        }
        assert_eq!((forward_variant(6144).warps, backward_variant(6144).warps), (8, 12));
    }

    /// Named barriers, which a warp by itself does without, are 1 to 15, and no kernel asks for more shared memory than any GPU gives unasked.
    #[test]
    fn blocks_are_within_the_limits_of_a_gpu() {
        for variant in BACKWARD {
            assert!(
                (variant.groups <= 15 || variant.warps == 1)
                    && variant.shared_bytes() <= 48 << 10
                    && variant.threads() <= 1024
            );
            assert!((2 * variant.rows).is_power_of_two());
        }
        for variant in FORWARD {
            assert!(variant.rows.is_power_of_two() && variant.shared_bytes() <= 48 << 10);
        }
    }

    /// Few rows get few blocks; many the persistent grid.
    #[test]
    fn partial_rows_follow_rows_and_multiprocessors() {
        assert_eq!(partial_rows(0, 192, 132), 1);
        assert_eq!(partial_rows(32, 192, 132), 1);
        assert_eq!(partial_rows(33, 192, 132), 2);
        assert_eq!(partial_rows(32_768, 768, 132), 132);
        assert_eq!(partial_rows(32_768, 768, 0), 1);
    }
}
