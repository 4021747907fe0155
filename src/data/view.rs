//! The pixels of a planned image at its target size: read, cropped, resized, flipped, augmented. Patches are cut from
//! them in [`patchify`](super::patchify).

use fast_image_resize::images::{Image as Pixels, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::data::augment::AugmentSettings;
use crate::data::frame::{Frame, PixelBox};
use crate::data::packing::PlannedImage;
use crate::data::pictures;
use crate::data::source::{Image, Source};
use crate::error::{Error, Result};
use crate::kernels::view::{Picture, Shares};
use crate::recipe::{Recipe, ViewsKind};
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
    /// Whether a device makes the patches, of pictures as they were decoded.
    pub on_device: bool,
}

impl ViewSettings {
    /// Settings of training, of a recipe that is valid.
    pub fn train(recipe: &Recipe) -> Self {
        Self {
            flip: recipe.data.flip,
            augment: AugmentSettings::new(recipe),
            on_device: recipe.data.views == ViewsKind::Device,
            ..Self::eval(recipe)
        }
    }

    /// Settings of evaluation: nothing is left to chance.
    pub fn eval(recipe: &Recipe) -> Self {
        let (seed, channels) = (recipe.train.seed, recipe.model.channels);
        Self { seed, channels, flip: false, augment: AugmentSettings::default(), on_device: false }
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
        let decoded = self.decode(image)?;
        self.finish(decoded, image)
    }

    /// The same as a picture that a device makes them of. What no kernel does, or has no `room`, is done here, and the
    /// picture is then of the target's size; where that has no room either, these are the pixels.
    ///
    /// # Errors
    /// As for [`view`](Self::view).
    pub fn picture(&mut self, image: &PlannedImage, room: Shares) -> Result<Result<Picture, Image>> {
        let decoded = self.decode(image)?;
        let settings = &self.settings;
        let ops = settings.augment.draw(settings.seed, image.epoch, image.sample);
        if let Some(ops) = pictures::ops(&ops, settings.channels) {
            let flipped = settings.flips(image.epoch, image.sample);
            let [rows, columns] = pictures::axes(&decoded, image).map_err(|e| self.named(image, e))?;
            let columns = if flipped { columns.reversed() } else { columns };
            if let Some(picture) = Picture::new(pictures::source(&decoded), &rows, &columns, &ops, room) {
                return Ok(Ok(picture));
            }
        }
        let pixels = self.finish(decoded, image)?;
        Ok(pictures::whole(&pixels, room).ok_or(pixels))
    }

    fn named(&self, image: &PlannedImage, error: Error) -> Error {
        Error::failure(format!("{}: {error}", self.source.name(image.sample as usize)))
    }

    /// All pixels of the sample.
    fn decode(&self, image: &PlannedImage) -> Result<Image> {
        let channels = self.settings.channels;
        let decoded = self.source.load(image.sample as usize, channels)?;
        if decoded.channels == channels {
            return Ok(decoded);
        }
        let other = format!("an image of {} channels where {channels} are needed", decoded.channels);
        Err(self.named(image, Error::failure(other)))
    }

    /// From all pixels to those of the view.
    fn finish(&mut self, decoded: Image, image: &PlannedImage) -> Result<Image> {
        let mut pixels = framed(&mut self.resizer, decoded, image).map_err(|e| self.named(image, e))?;
        let settings = &self.settings;
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
            let rows = Line::new(top, size.0, height, image.height);
            let columns = Line::new(left, size.1, width, image.width);
            let channels = image.channels;
            let area = [columns.start, rows.start, columns.length, rows.length];
            let seen = resize(resizer, image, Some(area), (rows.seen, columns.seen))?;
            let mut pixels = Vec::with_capacity(size.0 * size.1 * channels);
            for row in rows.shown {
                for column in &columns.shown {
                    let at = (row * columns.seen + column) * channels;
                    pixels.extend_from_slice(&seen.pixels[at..at + channels]);
                }
            }
            Ok(Image { height: size.0, width: size.1, channels, pixels })
        }
    }
}

/// One axis of what a [`Frame::Cut`] shows. Only what is seen is resized: the longer side of a panorama may be very long.
pub(crate) struct Line {
    /// Of each pixel that is shown its place among those that are seen.
    pub shown: Vec<usize>,
    /// How many pixels are seen after resizing.
    pub seen: usize,
    /// The stretch of the image that becomes them.
    pub start: f64,
    /// Its length in pixels of the image.
    pub length: f64,
}

impl Line {
    /// `shown` pixels from `first` on of an axis of `source` pixels that is resized to `full` and mirrored at its ends.
    pub fn new(first: isize, shown: usize, full: usize, source: usize) -> Self {
        let mut places: Vec<usize> = (0..shown).map(|x| mirrored(first + x as isize, full)).collect();
        let first = places.iter().copied().min().unwrap_or(0);
        let seen = places.iter().copied().max().unwrap_or(0) - first + 1;
        places.iter_mut().for_each(|place| *place -= first);
        if seen == full {
            return Self { shown: places, seen, start: 0.0, length: source as f64 };
        }
        let scaled = |pixels: usize| pixels as f64 * source as f64 / full as f64;
        let start = scaled(first) + OFF_CENTRE;
        Self { shown: places, seen, start, length: scaled(seen).min(source as f64 - start) }
    }
}

/// The pixel that stands at `at` when a line of `length` pixels is mirrored beyond its ends, without repeating them.
fn mirrored(at: isize, length: usize) -> usize {
    let last = length - 1;
    let at = at.unsigned_abs() % (2 * last).max(1);
    if at > last { 2 * last - at } else { at }
}

/// Refuses a box that is not within the image.
pub(crate) fn check_box(image: &Image, area: PixelBox) -> Result<()> {
    let PixelBox { top, left, height, width } = area;
    if top + height > image.height || left + width > image.width {
        return Err(Error::failure(format!(
            "an image of {}x{} pixels is smaller than its header said",
            image.height, image.width
        )));
    }
    Ok(())
}

fn boxed(image: &Image, area: PixelBox) -> Result<Image> {
    check_box(image, area)?;
    let PixelBox { top, left, height, width } = area;
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
