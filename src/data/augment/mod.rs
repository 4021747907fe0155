//! What is done to the pixels of a training image beside cropping and mirroring it: DeiT III's 3-Augment and colour
//! jitter, and the RandAugment of its fine-tuning, on 8-bit values between the steps as in the reference pipelines.
//!
//! First [`AugmentSettings::draw`] decides, then [`Op::apply`] computes what Pillow computes, to the bit. Making a grey
//! image grey and changing its saturation leaves it as it is; everything else is done to it as well.

mod affine;
mod blur;
mod enhance;
mod table;

use rand::RngExt;
use rand_distr::StandardNormal;

use crate::data::order::below;
use crate::data::source::Image;
use crate::recipe::{AugmentConfig, RandAugment, Recipe};
use crate::rng::{Purpose, Stream};

/// Values from which on 3-Augment's solarisation inverts.
const SOLARIZE: u16 = 128;
/// Radii of 3-Augment's blur in pixels.
const BLUR: [f64; 2] = [0.1, 2.0];

/// An operation on pixels with its parameter, named after timm's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// Colours become their luma (BT.601).
    Grayscale,
    /// Values from the threshold (0..=256) on are inverted.
    Solarize(u16),
    /// A Gaussian blur of a standard deviation in pixels.
    GaussianBlur(f64),
    /// Blend with black: 0 is black, 1 changes nothing, more is brighter.
    Brightness(f64),
    /// Blend with the mean luma.
    Contrast(f64),
    /// Blend with the luma.
    Saturation(f64),
    /// Blend with the smoothed image: below 1 smoother, above 1 sharper.
    Sharpness(f64),
    /// Stretches each channel to 0..255.
    AutoContrast,
    /// Flattens each channel's histogram.
    Equalize,
    /// Inverts all values.
    Invert,
    /// Keeps so many of the upper bits.
    Posterize(u32),
    /// Adds to values below 128.
    SolarizeAdd(u8),
    /// Turns counterclockwise by degrees.
    Rotate(f64),
    /// Shifts rows by so many pixels a row.
    ShearX(f64),
    /// Shifts columns by so many pixels a column.
    ShearY(f64),
    /// Shifts to the left by a share of the width.
    TranslateX(f64),
    /// Shifts up by a share of the height.
    TranslateY(f64),
}

impl Op {
    /// Changes the image; `fill` is the colour of what comes from outside, one value a channel.
    pub fn apply(&self, image: &mut Image, fill: &[u8]) {
        match *self {
            Self::Grayscale => enhance::grayscale(image),
            Self::Solarize(threshold) => table::solarize(image, threshold),
            Self::GaussianBlur(radius) => blur::gaussian_blur(image, radius as f32),
            Self::Brightness(factor) => enhance::brightness(image, factor as f32),
            Self::Contrast(factor) => enhance::contrast(image, factor as f32),
            Self::Saturation(factor) => enhance::saturation(image, factor as f32),
            Self::Sharpness(factor) => enhance::sharpness(image, factor as f32),
            Self::AutoContrast => table::autocontrast(image),
            Self::Equalize => table::equalize(image),
            Self::Invert => table::invert(image),
            Self::Posterize(bits) => table::posterize(image, bits),
            Self::SolarizeAdd(add) => table::solarize_add(image, add),
            Self::Rotate(degrees) => affine::rotate(image, degrees, fill),
            Self::ShearX(factor) => affine::shear_x(image, factor, fill),
            Self::ShearY(factor) => affine::shear_y(image, factor, fill),
            Self::TranslateX(share) => affine::translate_x(image, share, fill),
            Self::TranslateY(share) => affine::translate_y(image, share, fill),
        }
    }
}

/// Which operations are drawn, from a recipe.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AugmentSettings {
    three_augment: bool,
    color_jitter: f64,
    rand_augment: Option<RandAugment>,
    /// `data.mean` as a colour, which `data.mean` and `data.std` make zero.
    fill: Vec<u8>,
}

impl AugmentSettings {
    /// Those of a valid recipe's training.
    pub fn new(recipe: &Recipe) -> Self {
        let AugmentConfig { three_augment, color_jitter, .. } = recipe.augment;
        // A valid recipe has one that is understood, or none.
        let rand_augment = recipe.augment.rand_augment().unwrap_or_default();
        let fill = recipe.data.mean.iter().map(|mean| (255.0 * mean).round_ties_even() as u8).collect();
        Self { three_augment, color_jitter, rand_augment, fill }
    }

    /// The colour of what comes from outside of an image, one value for each channel or for all.
    pub fn fill(&self) -> &[u8] {
        &self.fill
    }

    /// The operations on `sample` under the key `(seed, epoch, sample)`, in order.
    pub fn draw(&self, seed: u64, epoch: u64, sample: u64) -> Vec<Op> {
        let stream = |purpose| Stream::new(seed, epoch, sample, purpose);
        let mut ops = Vec::new();
        if self.three_augment {
            ops.push(three_augment(&mut stream(Purpose::ThreeAugment)));
        }
        if self.color_jitter > 0.0 {
            ops.extend(color_jitter(self.color_jitter, &mut stream(Purpose::ColorJitter)));
        }
        if let Some(settings) = &self.rand_augment {
            ops.extend(rand_augment(settings, &mut stream(Purpose::RandAugment)));
        }
        ops
    }
}

fn between(low: f64, high: f64, stream: &mut Stream) -> f64 {
    low + (high - low) * f64::from(stream.uniform())
}

/// One of three, with equal probability (DeiT III's `augment.py`).
fn three_augment(stream: &mut Stream) -> Op {
    match below(stream, 3) {
        0 => Op::Grayscale,
        1 => Op::Solarize(SOLARIZE),
        _ => Op::GaussianBlur(between(BLUR[0], BLUR[1], stream)),
    }
}

/// torchvision's `ColorJitter(strength, strength, strength)`: three factors from max(0, 1 − strength) to 1 + strength,
/// in random order.
fn color_jitter(strength: f64, stream: &mut Stream) -> [Op; 3] {
    let mut factor = || between((1.0 - strength).max(0.0), 1.0 + strength, stream);
    let mut ops = [Op::Brightness(factor()), Op::Contrast(factor()), Op::Saturation(factor())];
    for i in (1..ops.len()).rev() {
        ops.swap(i, below(stream, i as u32 + 1) as usize);
    }
    ops
}

/// timm's `RandAugment` over `_RAND_INCREASING_TRANSFORMS`, drawn with replacement.
fn rand_augment(settings: &RandAugment, stream: &mut Stream) -> Vec<Op> {
    let mut ops = Vec::with_capacity(settings.layers);
    for _ in 0..settings.layers {
        let kind = below(stream, 15);
        if f64::from(stream.uniform()) >= settings.share {
            continue;
        }
        let noise = if settings.std > 0.0 { stream.sample::<f64, _>(StandardNormal) } else { 0.0 };
        let level = (settings.magnitude + settings.std * noise).clamp(0.0, 10.0) / 10.0;
        let sign = if stream.bits() & 1 == 0 { 1.0 } else { -1.0 };
        // At least 0.1, as timm has it, though no level goes below.
        let factor = (1.0 + sign * level * 0.9).max(0.1);
        ops.push(match kind {
            0 => Op::AutoContrast,
            1 => Op::Equalize,
            2 => Op::Invert,
            3 => Op::Rotate(sign * level * 30.0),
            4 => Op::Posterize(4 - (level * 4.0) as u32),
            5 => Op::Solarize(256 - (level * 256.0) as u16),
            6 => Op::SolarizeAdd((level * 110.0) as u8),
            7 => Op::Saturation(factor),
            8 => Op::Contrast(factor),
            9 => Op::Brightness(factor),
            10 => Op::Sharpness(factor),
            11 => Op::ShearX(sign * level * 0.3),
            12 => Op::ShearY(sign * level * 0.3),
            13 => Op::TranslateX(sign * level * 0.45),
            _ => Op::TranslateY(sign * level * 0.45),
        });
    }
    ops
}
