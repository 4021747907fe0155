//! The pixels of a planned image at its target size: read, resized, flipped. Patches are cut from them in
//! [`patchify`](super::patchify).

use fast_image_resize::images::{Image as Pixels, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::data::packing::PlannedImage;
use crate::data::source::{Image, Source};
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::rng::{Purpose, Stream};

/// What is done to images, from a recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct ViewSettings {
    /// Seed of every random decision.
    pub seed: u64,
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Whether a random half of the images is mirrored left to right.
    pub flip: bool,
}

impl ViewSettings {
    /// Settings of training.
    pub fn train(recipe: &Recipe) -> Self {
        Self { seed: recipe.train.seed, channels: recipe.model.channels, flip: recipe.data.flip }
    }

    /// Settings of evaluation: nothing is left to chance.
    pub fn eval(recipe: &Recipe) -> Self {
        Self { flip: false, ..Self::train(recipe) }
    }
}

/// Makes planned images from files. One per thread: it keeps buffers from image to image.
pub struct Viewer<'a> {
    source: &'a dyn Source,
    settings: ViewSettings,
    resizer: Resizer,
}

impl<'a> Viewer<'a> {
    /// Views of the images of `source`.
    pub fn new(source: &'a dyn Source, settings: ViewSettings) -> Self {
        Self { source, settings, resizer: Resizer::new() }
    }

    /// The pixels of `image`, of its target's height and width. They depend on the seed, the sample, the key epoch
    /// and the plan alone.
    ///
    /// # Errors
    /// An image that cannot be read, or is not what its source promised; the error names it.
    pub fn view(&mut self, image: &PlannedImage) -> Result<Image> {
        let Self { source, settings, resizer } = self;
        let index = image.sample as usize;
        let decoded = source.load(index, settings.channels)?;
        let named = |e: Error| Error::failure(format!("{}: {e}", source.name(index)));
        if decoded.channels != settings.channels {
            return Err(named(Error::failure(format!(
                "an image of {} channels where {} are needed",
                decoded.channels, settings.channels
            ))));
        }
        let size = (image.target.height, image.target.width);
        let mut pixels = resize(resizer, decoded, size).map_err(named)?;
        if settings.flip && is_flipped(settings.seed, image.epoch, image.sample) {
            flip(&mut pixels);
        }
        Ok(pixels)
    }
}

/// Whether an image is mirrored in training, where flips are asked for.
fn is_flipped(seed: u64, epoch: u64, sample: u64) -> bool {
    Stream::new(seed, epoch, sample, Purpose::Augment).bits() & 1 == 1
}

/// `image` of `size` (height, width): bicubic, a = −0.5, antialiased (the filter widens with the reduction).
fn resize(resizer: &mut Resizer, image: Image, size: (usize, usize)) -> Result<Image> {
    if (image.height, image.width) == size {
        return Ok(image);
    }
    let kind = if image.channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
    let cause = |e: &dyn std::fmt::Display| {
        Error::failure(format!("cannot resize {}x{} pixels: {e}", image.height, image.width))
    };
    let (height, width) = size;
    let from =
        ImageRef::new(image.width as u32, image.height as u32, &image.pixels, kind).map_err(|e| cause(&e))?;
    let mut pixels = vec![0; height * width * image.channels];
    let mut to =
        Pixels::from_slice_u8(width as u32, height as u32, &mut pixels, kind).map_err(|e| cause(&e))?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    resizer.resize(&from, &mut to, &options).map_err(|e| cause(&e))?;
    Ok(Image { height, width, channels: image.channels, pixels })
}

/// Mirrors left to right.
fn flip(image: &mut Image) {
    for row in image.pixels.chunks_exact_mut((image.width * image.channels).max(1)) {
        row.reverse();
        if image.channels == 3 {
            row.as_chunks_mut::<3>().0.iter_mut().for_each(|pixel| pixel.swap(0, 2));
        }
    }
}
