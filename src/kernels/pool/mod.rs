//! From the tokens of an image to one vector: masked attention pooling, mean pooling and token gather of packed
//! rows.
//!
//! A block owns a piece of an image of at most [`CHUNK`] pooled tokens, so a long image is many blocks'
//! work, and grids depend on sizes alone: `T / CHUNK + N` pieces serve any batch. See
//! `kernels/pool/chunks.cuh`.

mod attention;
mod checked;
mod gather;
mod mean;

pub use attention::{
    AttentionBackwardParams, AttentionForwardParams, AttentionQuery, AttentionShape, MAX_HEAD_DIM,
    MAX_QUERIES, launch_attention_backward, launch_attention_forward,
};
pub use checked::{AttentionBackward, AttentionForward, AttentionPool, Query};
pub use gather::{GatherParams, TokenGather, launch_gather_backward, launch_gather_forward};
pub use mean::{MeanBackwardParams, MeanForwardParams, MeanPool, launch_mean_backward, launch_mean_forward};

pub use super::registry::pool as instances;

use crate::error::{Error, Result};

/// Pooled tokens of a piece.
pub const CHUNK: usize = 512;

/// Sizes of the packed batch: constants of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedSizes {
    /// Token rows T.
    pub tokens: usize,
    /// Image slots N.
    pub images: usize,
    /// Tokens at the beginning of every image that are left out.
    pub skip: usize,
}

impl PackedSizes {
    /// Pieces of the images, whatever their sizes.
    fn pieces(&self) -> usize {
        self.tokens / CHUNK + self.images
    }

    fn check(&self) -> Result<()> {
        if self.images > 0 && [self.tokens, self.images, self.skip].iter().all(|&n| n <= 1 << 30) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "pooling {} tokens of {} image slots without {} each is not possible: there must be at least one \
             slot and no number above 2^30",
            self.tokens, self.images, self.skip
        )))
    }
}

/// What the error word says that the kernels set, once it has been copied to the host.
///
/// # Errors
/// `cu_seqlens` was no list of images: what was computed from it means nothing.
pub fn fault(word: i32) -> Result<()> {
    let what = match word {
        0 => return Ok(()),
        1 => "does not begin at 0",
        2 => "decreases",
        _ => "ends beyond the token rows of the batch",
    };
    Err(Error::usage(format!(
        "cu_seqlens on the device {what}, so pooling has no right result; give the start of every image, \
         ascending from 0, and the end of the last one"
    )))
}

/// Blocks of a grid along x.
fn grid(blocks: usize) -> Result<[u32; 3]> {
    match i32::try_from(blocks) {
        Ok(blocks) => Ok([blocks as u32, 1, 1]),
        Err(_) => Err(Error::usage(format!(
            "pooling would need {blocks} blocks, more than 2^31 - 1; use a smaller token budget or fewer heads"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbering of `chunks.cuh`: every piece has its own number, below the count.
    #[test]
    fn pieces_of_any_batch_fit() {
        for lengths in [&[0, 1, 511, 512, 513, 3000, 0, 77][..], &[512; 9], &[1; 40], &[16_384]] {
            let tokens: usize = lengths.iter().sum();
            let sizes = PackedSizes { tokens, images: lengths.len(), skip: 0 };
            let (mut start, mut next) = (0, 0);
            for (image, length) in lengths.iter().enumerate() {
                let first = start / CHUNK + image;
                assert!(first >= next);
                next = first + length.div_ceil(CHUNK);
                start += length;
            }
            assert!(next <= sizes.pieces());
        }
    }

    #[test]
    fn sizes_are_checked() {
        let sizes = PackedSizes { tokens: 8, images: 1, skip: 0 };
        assert!(sizes.check().is_ok());
        assert!(PackedSizes { images: 0, ..sizes }.check().is_err());
        assert!(PackedSizes { tokens: 1 << 31, ..sizes }.check().is_err());
        assert!(grid(1 << 31).is_err());
    }
}
