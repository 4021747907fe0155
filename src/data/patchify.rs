//! An image at its target size → the kept patches as rows of a batch.

use crate::data::resolution::Target;
use crate::data::source::Image;
use crate::error::{Error, Result};

/// Cuts images into patches.
#[derive(Clone, Copy, Debug)]
pub struct Patchifier {
    patch: usize,
    channels: usize,
}

impl Patchifier {
    /// For patches of side `patch` with `channels` (1 or 3) channels.
    pub fn new(patch: usize, channels: usize) -> Self {
        Self { patch, channels }
    }

    /// Bytes of one patch: channels × patch × patch.
    pub fn patch_dim(&self) -> usize {
        self.channels * self.patch * self.patch
    }

    /// Writes the patches `kept` (raster indices into the target's grid) of `image`, which has the target's size,
    /// to `rows`, `[kept, C·P·P]` with inner order (channel, row, column).
    ///
    /// # Errors
    /// An image of another size or number of channels.
    pub fn write(&self, image: &Image, target: &Target, kept: &[u32], rows: &mut [u8]) -> Result<()> {
        let (patch, channels, width) = (self.patch, self.channels, image.width);
        if image.channels != channels || (image.height, width) != (target.height, target.width) {
            return Err(Error::failure(format!(
                "an image of {}x{width} pixels and {} channels where {}x{} and {channels} are needed",
                image.height, image.channels, target.height, target.width
            )));
        }
        let plane = patch * patch;
        for (row, &index) in rows.chunks_exact_mut(self.patch_dim()).zip(kept) {
            let top = index as usize / target.grid.cols * patch;
            let left = index as usize % target.grid.cols * patch;
            for y in 0..patch {
                let start = ((top + y) * width + left) * channels;
                let line = &image.pixels[start..start + patch * channels];
                let at = y * patch..(y + 1) * patch;
                if channels == 1 {
                    row[at].copy_from_slice(line);
                } else {
                    let (red, rest) = row.split_at_mut(plane);
                    let (green, blue) = rest.split_at_mut(plane);
                    let planes =
                        red[at.clone()].iter_mut().zip(&mut green[at.clone()]).zip(&mut blue[at.clone()]);
                    for (pixel, ((r, g), b)) in line.chunks_exact(3).zip(planes) {
                        (*r, *g, *b) = (pixel[0], pixel[1], pixel[2]);
                    }
                }
            }
        }
        Ok(())
    }
}
