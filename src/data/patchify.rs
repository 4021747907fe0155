//! Image → resized → flipped → the kept patches as rows of a batch.

use fast_image_resize::images::{Image as Pixels, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::data::resolution::Target;
use crate::data::source::Image;
use crate::error::{Error, Result};

/// Cuts images into patches; keeps its buffers from image to image. One per thread.
pub struct Patchifier {
    patch: usize,
    channels: usize,
    resizer: Resizer,
    resized: Vec<u8>,
}

impl Patchifier {
    /// For patches of side `patch` with `channels` (1 or 3) channels.
    pub fn new(patch: usize, channels: usize) -> Self {
        Self { patch, channels, resizer: Resizer::new(), resized: Vec::new() }
    }

    /// Bytes of one patch: channels × patch × patch.
    pub fn patch_dim(&self) -> usize {
        self.channels * self.patch * self.patch
    }

    /// Resizes `image` to the target (bicubic, a = −0.5, antialiased: the filter widens with the
    /// reduction), mirrors it left to right when `flip`, and writes the patches `kept` (raster
    /// indices into the target's grid) to `rows`, `[kept, C·P·P]` with inner order (channel, row,
    /// column).
    ///
    /// # Errors
    /// An image of another number of channels.
    pub fn write(
        &mut self,
        image: &Image,
        target: &Target,
        flip: bool,
        kept: &[u32],
        rows: &mut [u8],
    ) -> Result<()> {
        let (patch, channels, width) = (self.patch, self.channels, target.width);
        if image.channels != channels {
            return Err(Error::failure(format!(
                "an image of {} channels where {channels} are needed",
                image.channels
            )));
        }
        let patch_dim = self.patch_dim();
        let pixels: &[u8] = if (image.height, image.width) == (target.height, width) {
            &image.pixels
        } else {
            self.resize(image, target)?;
            &self.resized
        };
        let plane = patch * patch;
        for (row, &index) in rows.chunks_exact_mut(patch_dim).zip(kept) {
            let top = index as usize / target.grid.cols * patch;
            let left = index as usize % target.grid.cols * patch;
            // A mirrored patch is read from the other end of the row, backwards.
            let first = if flip { width - left - patch } else { left };
            for y in 0..patch {
                let start = ((top + y) * width + first) * channels;
                let line = &pixels[start..start + patch * channels];
                let at = y * patch..(y + 1) * patch;
                if channels == 1 {
                    row[at.clone()].copy_from_slice(line);
                } else {
                    let (red, rest) = row.split_at_mut(plane);
                    let (green, blue) = rest.split_at_mut(plane);
                    let planes =
                        red[at.clone()].iter_mut().zip(&mut green[at.clone()]).zip(&mut blue[at.clone()]);
                    for (pixel, ((r, g), b)) in line.chunks_exact(3).zip(planes) {
                        (*r, *g, *b) = (pixel[0], pixel[1], pixel[2]);
                    }
                }
                if flip {
                    row.chunks_exact_mut(plane).for_each(|plane| plane[at.clone()].reverse());
                }
            }
        }
        Ok(())
    }

    fn resize(&mut self, image: &Image, target: &Target) -> Result<()> {
        let kind = if self.channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
        let cause = |e: &dyn std::fmt::Display| {
            Error::failure(format!("cannot resize {}x{} pixels: {e}", image.height, image.width))
        };
        let from = ImageRef::new(image.width as u32, image.height as u32, &image.pixels, kind)
            .map_err(|e| cause(&e))?;
        self.resized.resize(target.height * target.width * self.channels, 0);
        let mut to =
            Pixels::from_slice_u8(target.width as u32, target.height as u32, &mut self.resized, kind)
                .map_err(|e| cause(&e))?;
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
        self.resizer.resize(&from, &mut to, &options).map_err(|e| cause(&e))
    }
}
