//! The pixels of one planned image, all of its patches, and which of them are kept.

use super::canvas::Colour;
use crate::data::packing::{PackingSettings, PlannedImage};
use crate::data::patchify::Patchifier;
use crate::data::source::Source;
use crate::data::view::{ViewSettings, Viewer};
use crate::recipe::Recipe;

/// An image as it enters the batch, before tokens are dropped.
pub struct Picture {
    /// Pixel rows.
    pub height: usize,
    /// Pixel columns.
    pub width: usize,
    pixels: Vec<Colour>,
    patch: usize,
    cols: usize,
    kept: Vec<bool>,
}

/// One patch of a picture.
pub struct Shard<'a> {
    picture: &'a Picture,
    corner: (usize, usize),
}

/// Reads an image as the loader does; black where it cannot be read.
pub fn load(source: &dyn Source, recipe: &Recipe, image: &PlannedImage) -> Picture {
    let (patch, channels) = (recipe.model.patch, recipe.model.channels);
    let grid = image.target.grid;
    let patchifier = Patchifier::new(patch, channels);
    let patch_dim = patchifier.patch_dim();
    let mut rows = vec![0; grid.patches() * patch_dim];
    let all: Vec<u32> = (0..grid.patches() as u32).collect();
    // An unreadable image leaves `rows` black; the loader is the one to report it.
    let _ = Viewer::new(source, ViewSettings::train(recipe))
        .view(image)
        .and_then(|pixels| patchifier.write(&pixels, &image.target, &all, &mut rows));

    let (height, width) = (grid.rows * patch, grid.cols * patch);
    let pixel = |y: usize, x: usize| {
        let row = &rows[(y / patch * grid.cols + x / patch) * patch_dim..][..patch_dim];
        let inside = y % patch * patch + x % patch;
        std::array::from_fn(|channel| row[channel % channels * patch * patch + inside])
    };
    let pixels = (0..height * width).map(|i| pixel(i / width, i % width)).collect();
    let mut kept = vec![false; grid.patches()];
    let indices = PackingSettings::train(recipe).map(|settings| settings.kept(image)).unwrap_or(all);
    indices.into_iter().for_each(|index| kept[index as usize] = true);
    Picture { height, width, pixels, patch, cols: grid.cols, kept }
}

impl Picture {
    /// The colour of pixel `(x, y)` when the picture is drawn `size` (width, height) large.
    pub fn sample(&self, at: (usize, usize), size: (usize, usize)) -> Colour {
        self.average((0, 0), (self.width, self.height), at, size)
    }

    /// Whether the patch that covers pixel (x, y) is kept.
    pub fn is_kept(&self, x: usize, y: usize) -> bool {
        self.kept[y / self.patch * self.cols + x / self.patch]
    }

    /// The patch with a raster index.
    pub fn shard(&self, index: usize) -> Shard<'_> {
        let corner = (index % self.cols * self.patch, index / self.cols * self.patch);
        Shard { picture: self, corner }
    }

    /// Mean over what one pixel of a drawing covers of the rectangle at `corner`.
    fn average(
        &self,
        corner: (usize, usize),
        extent: (usize, usize),
        at: (usize, usize),
        size: (usize, usize),
    ) -> Colour {
        let span = |at: usize, extent: usize, size: usize| {
            let first = at * extent / size;
            first..((at + 1) * extent / size).max(first + 1)
        };
        let mut sum = [0u32; 3];
        let mut count = 0;
        for y in span(at.1, extent.1, size.1) {
            for x in span(at.0, extent.0, size.0) {
                let pixel = self.pixels[(corner.1 + y) * self.width + corner.0 + x];
                sum.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += u32::from(value));
                count += 1;
            }
        }
        sum.map(|sum| (sum / count) as u8)
    }
}

impl Shard<'_> {
    /// The colour of pixel `(x, y)` when the patch is drawn `size` (width, height) large.
    pub fn sample(&self, at: (usize, usize), size: (usize, usize)) -> Colour {
        let patch = self.picture.patch;
        self.picture.average(self.corner, (patch, patch), at, size)
    }
}
