//! Which part of an image is seen, and at which scale. Decided in planning: the shape of a crop decides the size of
//! what is cut into patches, and so the number of tokens.

use crate::data::order::below;
use crate::data::resolution::Target;
use crate::recipe::{AugmentConfig, CropKind, EvalConfig};
use crate::rng::Stream;

/// Boxes of a random area and shape that are tried before the middle of the image is taken.
const ATTEMPTS: usize = 10;

/// A rectangle of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelBox {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Rows, at least 1.
    pub height: usize,
    /// Columns, at least 1.
    pub width: usize,
}

/// How an image becomes its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// All of it is resized to the target's size.
    Whole,
    /// A box of its pixels is cut out and resized to the target's size.
    Box(PixelBox),
    /// It is resized to `height` x `width`, and the target is cut out there with its first pixel at (`top`, `left`).
    /// Beyond the edges the picture is mirrored, the outermost pixel not repeated.
    Cut {
        /// Rows after resizing.
        height: usize,
        /// Columns after resizing.
        width: usize,
        /// Row of the target's first pixel; negative above the picture.
        top: isize,
        /// Column of the target's first pixel; negative to the left of the picture.
        left: isize,
    },
}

impl Frame {
    /// The part of an image of `size` (height, width) that the target shows, in its pixels: (top, left, height,
    /// width). What is mirrored lies outside of the image.
    pub fn seen(&self, size: (usize, usize), target: &Target) -> [f64; 4] {
        match *self {
            Self::Whole => [0.0, 0.0, size.0 as f64, size.1 as f64],
            Self::Box(PixelBox { top, left, height, width }) => {
                [top, left, height, width].map(|pixels| pixels as f64)
            }
            Self::Cut { height, width, top, left } => {
                let (y, x) = (size.0 as f64 / height as f64, size.1 as f64 / width as f64);
                [top as f64 * y, left as f64 * x, target.height as f64 * y, target.width as f64 * x]
            }
        }
    }

    /// The size (height, width) whose target was taken for an image of `size`.
    pub(crate) fn aimed(&self, size: (usize, usize)) -> (usize, usize) {
        match *self {
            Self::Whole => size,
            Self::Box(PixelBox { height, width, .. }) => (height, width),
            Self::Cut { .. } => (size.0.min(size.1), size.0.min(size.1)),
        }
    }
}

/// How frames are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Framing {
    /// Always the whole image.
    Whole,
    /// torchvision's `RandomResizedCrop`: a box with a share of the image's area uniform in `scale`, and a width over
    /// height log-uniform in `ratio`.
    RandomResized {
        /// Smallest and largest share of the area.
        scale: [f64; 2],
        /// Smallest and largest width over height.
        ratio: [f64; 2],
    },
    /// DeiT III's simple random crop: the shorter side is resized to the target's, the image mirrored over its edges by
    /// `padding` pixels, and a square cut out anywhere.
    Simple {
        /// Pixels.
        padding: usize,
    },
    /// The square in the middle, `ratio` of the shorter side large.
    Center {
        /// Above 0, at most 1.
        ratio: f64,
    },
}

impl Framing {
    /// Of training images.
    pub fn train(config: &AugmentConfig) -> Self {
        match config.crop {
            CropKind::None => Self::Whole,
            CropKind::Simple => Self::Simple { padding: config.padding },
            CropKind::RandomResized => Self::RandomResized { scale: config.scale, ratio: config.ratio },
        }
    }

    /// Of evaluation.
    pub fn eval(config: &EvalConfig) -> Self {
        if config.crop > 0.0 { Self::Center { ratio: config.crop } } else { Self::Whole }
    }

    /// The frame of an image of `size` (height, width) and its target. `aim` tells the target of something of a size;
    /// `stream` is for this alone.
    pub fn frame(
        &self,
        mut stream: Stream,
        size: (usize, usize),
        aim: impl Fn((usize, usize)) -> Target,
    ) -> (Frame, Target) {
        let shorter = size.0.min(size.1);
        match *self {
            Self::Whole => (Frame::Whole, aim(size)),
            Self::RandomResized { scale, ratio } => {
                let area = random_resized(&mut stream, size, scale, ratio);
                (Frame::Box(area), aim((area.height, area.width)))
            }
            Self::Simple { padding } => {
                let target = aim((shorter, shorter));
                let (height, width) = with_shorter_side(size, target.height);
                // From `-padding` on: one more place than there are pixels to spare.
                let mut place = |full: usize, cut: usize| {
                    below(&mut stream, (full + 2 * padding - cut + 1) as u32) as isize - padding as isize
                };
                let (top, left) = (place(height, target.height), place(width, target.width));
                (Frame::Cut { height, width, top, left }, target)
            }
            Self::Center { ratio } => {
                let target = aim((shorter, shorter));
                let (height, width) = with_shorter_side(size, (target.height as f64 / ratio) as usize);
                let middle = |full: usize, cut: usize| ((full - cut) as f64 / 2.0).round_ties_even() as isize;
                let (top, left) = (middle(height, target.height), middle(width, target.width));
                (Frame::Cut { height, width, top, left }, target)
            }
        }
    }
}

/// Size of an image of `size` (height, width) whose shorter side becomes `shorter`; the longer is rounded down, as
/// torchvision's `Resize` does.
fn with_shorter_side(size: (usize, usize), shorter: usize) -> (usize, usize) {
    let longer = |long: usize, short: usize| (shorter * long / short).max(shorter);
    if size.0 <= size.1 { (shorter, longer(size.1, size.0)) } else { (longer(size.0, size.1), shorter) }
}

/// torchvision's `RandomResizedCrop.get_params`; its `round` takes halves to the even number.
fn random_resized(stream: &mut Stream, size: (usize, usize), scale: [f64; 2], ratio: [f64; 2]) -> PixelBox {
    let (height, width) = size;
    let area = height as f64 * width as f64;
    let [low, high] = ratio.map(libm::log);
    let between = |low: f64, high: f64, stream: &mut Stream| low + (high - low) * f64::from(stream.uniform());
    for _ in 0..ATTEMPTS {
        let area = area * between(scale[0], scale[1], stream);
        let shape = libm::exp(between(low, high, stream));
        let w = (area * shape).sqrt().round_ties_even() as usize;
        let h = (area / shape).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let top = below(stream, (height - h + 1) as u32) as usize;
            let left = below(stream, (width - w + 1) as u32) as usize;
            return PixelBox { top, left, height: h, width: w };
        }
    }
    // The middle, as much of it as the shapes allow.
    let shape = width as f64 / height as f64;
    let whole = |pixels: f64, most: usize| (pixels.round_ties_even() as usize).clamp(1, most);
    let (height_of, width_of) = if shape < ratio[0] {
        (whole(width as f64 / ratio[0], height), width)
    } else if shape > ratio[1] {
        (height, whole(height as f64 * ratio[1], width))
    } else {
        (height, width)
    };
    let (top, left) = ((height - height_of) / 2, (width - width_of) / 2);
    PixelBox { top, left, height: height_of, width: width_of }
}
