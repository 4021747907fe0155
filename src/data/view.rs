//! The pixels of a planned image at its target size: read, cropped, resized, flipped, augmented. Patches are cut from
//! them in [`patchify`](super::patchify).

use fast_image_resize::images::{Image as Pixels, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::data::augment::AugmentSettings;
use crate::data::frame::{Frame, PixelBox};
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
    /// What is done to the pixels.
    pub augment: AugmentSettings,
}

impl ViewSettings {
    /// Settings of training, of a recipe that is valid.
    pub fn train(recipe: &Recipe) -> Self {
        Self { flip: recipe.data.flip, augment: AugmentSettings::new(recipe), ..Self::eval(recipe) }
    }

    /// Settings of evaluation: nothing is left to chance.
    pub fn eval(recipe: &Recipe) -> Self {
        let (seed, channels) = (recipe.train.seed, recipe.model.channels);
        Self { seed, channels, flip: false, augment: AugmentSettings::default() }
    }

    /// Whether the sample is mirrored under the key `(seed, epoch, sample)`.
    pub fn flips(&self, epoch: u64, sample: u64) -> bool {
        self.flip && Stream::new(self.seed, epoch, sample, Purpose::Augment).bits() & 1 == 1
    }
}

/// Pixels by which a rectangle that is resized is moved, which changes no value. Where the middle of its first or last
/// pixel fell on that of a pixel of the image, fast_image_resize 6.1 would leave out the filter's zeros there, take the
/// rectangle for smaller than what the pixels beside it need, and read outside of its buffer.
const OFF_CENTRE: f64 = 1e-6;

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
        let mut pixels = framed(resizer, decoded, image).map_err(named)?;
        if settings.flips(image.epoch, image.sample) {
            flip(&mut pixels);
        }
        for op in settings.augment.draw(settings.seed, image.epoch, image.sample) {
            op.apply(&mut pixels, settings.augment.fill());
        }
        Ok(pixels)
    }
}

/// `image` of `size` (height, width), for pictures of it.
pub(crate) fn resized(image: Image, size: (usize, usize)) -> Result<Image> {
    resize(&mut Resizer::new(), image, None, size)
}

/// What the plan shows of `image`, at the target's size.
fn framed(resizer: &mut Resizer, image: Image, plan: &PlannedImage) -> Result<Image> {
    let size = (plan.target.height, plan.target.width);
    match plan.frame {
        Frame::Whole => resize(resizer, image, None, size),
        Frame::Box(area) => resize(resizer, boxed(&image, area)?, None, size),
        Frame::Cut { height, width, top, left } => {
            let rows: Vec<usize> = (0..size.0).map(|y| mirrored(top + y as isize, height)).collect();
            let columns: Vec<usize> = (0..size.1).map(|x| mirrored(left + x as isize, width)).collect();
            // Only what is seen is resized: the longer side of a panorama may be very long.
            let (first_row, seen_rows) = extent(&rows);
            let (first_column, seen_columns) = extent(&columns);
            let place = |first: usize, seen: usize, of: usize, from: usize| {
                if seen == of {
                    return (0.0, from as f64);
                }
                let scaled = |pixels: usize| pixels as f64 * from as f64 / of as f64;
                let start = scaled(first) + OFF_CENTRE;
                (start, scaled(seen).min(from as f64 - start))
            };
            let (y, h) = place(first_row, seen_rows, height, image.height);
            let (x, w) = place(first_column, seen_columns, width, image.width);
            let channels = image.channels;
            let seen = resize(resizer, image, Some([x, y, w, h]), (seen_rows, seen_columns))?;
            let mut pixels = Vec::with_capacity(size.0 * size.1 * channels);
            for row in rows {
                for column in &columns {
                    let at = ((row - first_row) * seen_columns + column - first_column) * channels;
                    pixels.extend_from_slice(&seen.pixels[at..at + channels]);
                }
            }
            Ok(Image { height: size.0, width: size.1, channels, pixels })
        }
    }
}

/// The smallest of some indices, and how many lie from there to the largest.
fn extent(indices: &[usize]) -> (usize, usize) {
    let first = indices.iter().copied().min().unwrap_or(0);
    (first, indices.iter().copied().max().unwrap_or(0) - first + 1)
}

/// The pixel that stands at `at` when a line of `length` pixels is mirrored beyond its ends, without repeating them.
fn mirrored(at: isize, length: usize) -> usize {
    let last = length - 1;
    let at = at.unsigned_abs() % (2 * last).max(1);
    if at > last { 2 * last - at } else { at }
}

fn boxed(image: &Image, area: PixelBox) -> Result<Image> {
    let PixelBox { top, left, height, width } = area;
    if top + height > image.height || left + width > image.width {
        return Err(Error::failure(format!(
            "an image of {}x{} pixels is smaller than its header said",
            image.height, image.width
        )));
    }
    let line = image.width * image.channels;
    let columns = left * image.channels..(left + width) * image.channels;
    let rows = image.pixels.chunks_exact(line).skip(top).take(height);
    let pixels = rows.flat_map(|row| &row[columns.clone()]).copied().collect();
    Ok(Image { height, width, channels: image.channels, pixels })
}

/// `image`, or its rectangle `area` (left, top, width, height), at `size` (height, width): bicubic, a = −0.5,
/// antialiased (the filter widens with the reduction). The filter reaches beyond the rectangle.
fn resize(
    resizer: &mut Resizer,
    image: Image,
    area: Option<[f64; 4]>,
    size: (usize, usize),
) -> Result<Image> {
    let whole = [0.0, 0.0, image.width as f64, image.height as f64];
    let [left, top, wide, high] = area.unwrap_or(whole);
    if (image.height, image.width) == size && [left, top, wide, high] == whole {
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
    let bicubic = ResizeAlg::Convolution(FilterType::CatmullRom);
    let options = ResizeOptions::new().resize_alg(bicubic).crop(left, top, wide, high);
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
