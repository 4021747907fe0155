//! How training images are varied.

use serde::{Deserialize, Serialize};

use super::validate::{MAX_SIDE, require, within};
use super::{AspectKind, Recipe, ResolutionKind};
use crate::{Error, Result};

/// Largest accepted number of repetitions.
const MAX_REPEATS: u64 = 1000;

choice! {
    /// Which part of a training image is seen.
    CropKind {
        /// All of it.
        None = "none",
        /// DeiT III's simple random crop: the shorter side is resized to the resolution, the edges are mirrored by
        /// `padding` pixels, and a square of the resolution is cut out anywhere.
        Simple = "simple",
        /// A box of random area and shape, resized to the resolution (Inception, torchvision's `RandomResizedCrop`).
        RandomResized = "random-resized",
    }
}

/// How training images are varied, beside `data.flip`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AugmentConfig {
    /// Which part of an image is seen.
    pub crop: CropKind,
    /// Smallest and largest share of the image's area (`random-resized`).
    pub scale: [f64; 2],
    /// Smallest and largest width over height of a crop (`random-resized`).
    pub ratio: [f64; 2],
    /// Pixels by which the edges are mirrored (`simple`).
    pub padding: usize,
    /// DeiT III's 3-Augment: each image becomes grey, is solarised, or is blurred, one of them at random.
    pub three_augment: bool,
    /// Brightness, contrast and saturation change by factors uniform in 1 ± this, in random order; 0 does not change
    /// them.
    pub color_jitter: f64,
    /// RandAugment in timm's notation, such as `rand-m9-mstd0.5-inc1`; empty for none.
    pub rand_augment: String,
    /// How often in a row an epoch draws each sample, each time augmented anew. It draws as many samples as without,
    /// the first of its order.
    pub repeats: usize,
}

impl Default for AugmentConfig {
    fn default() -> Self {
        Self {
            crop: CropKind::None,
            scale: [0.08, 1.0],
            ratio: [3.0 / 4.0, 4.0 / 3.0],
            padding: 4,
            three_augment: false,
            color_jitter: 0.0,
            rand_augment: String::new(),
            repeats: 1,
        }
    }
}

/// RandAugment as timm describes it: `layers` operations of its increasing set, each applied with probability `share`
/// at a magnitude ~ N(`magnitude`, `std`) cut to 0..10.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandAugment {
    /// 0..10.
    pub magnitude: f64,
    /// Standard deviation of the magnitude.
    pub std: f64,
    /// Operations drawn for an image.
    pub layers: usize,
    /// Probability that a drawn operation is applied.
    pub share: f64,
}

impl AugmentConfig {
    /// What `rand_augment` says, if anything.
    ///
    /// # Errors
    /// A notation that is not understood, or asks for what is not supported.
    pub fn rand_augment(&self) -> Result<Option<RandAugment>> {
        let text = self.rand_augment.as_str();
        if text.is_empty() {
            return Ok(None);
        }
        let refused = |why: String| {
            Error::usage(format!(
                "augment.rand_augment = \"{text}\" {why}; expected something like \"rand-m9-mstd0.5-inc1\""
            ))
        };
        let mut parts = text.split('-');
        if parts.next() != Some("rand") {
            return Err(refused("does not begin with \"rand\"".into()));
        }
        let mut found = RandAugment { magnitude: 10.0, std: 0.0, layers: 2, share: 0.5 };
        let mut increasing = false;
        for part in parts {
            let split = part.find(|c: char| c.is_ascii_digit()).unwrap_or(part.len());
            let (key, number) = part.split_at(split);
            let number: f64 = number.parse().map_err(|_| refused(format!("has no number in \"{part}\"")))?;
            let whole = number.fract() == 0.0;
            match key {
                "m" if whole && number <= 10.0 => found.magnitude = number,
                "m" => return Err(refused(format!("has \"{part}\", and m is a whole number from 0 to 10"))),
                "mstd" if number <= 100.0 => found.std = number,
                "mstd" => return Err(refused(format!("has \"{part}\", and mstd is at most 100"))),
                "n" if whole && (1.0..=15.0).contains(&number) => found.layers = number as usize,
                "n" => return Err(refused(format!("has \"{part}\", and n is a whole number from 1 to 15"))),
                "p" if number <= 1.0 => found.share = number,
                "p" => return Err(refused(format!("has \"{part}\", and p is a probability"))),
                "inc" if number == 1.0 => increasing = true,
                "inc" => return Err(refused(format!("has \"{part}\", and only inc1 is supported"))),
                _ => {
                    return Err(refused(format!(
                        "has \"{part}\", and only m, mstd, n, p and inc are supported"
                    )));
                }
            }
        }
        if !increasing {
            return Err(refused("lacks inc1, and only the increasing set of operations is supported".into()));
        }
        Ok(Some(found))
    }
}

impl Recipe {
    pub(super) fn validate_augment(&self) -> Result<()> {
        let (augment, resolution) = (&self.augment, &self.resolution);
        let rand_augment = augment.rand_augment()?;
        require((0.0..=1.0).contains(&augment.color_jitter), || {
            format!("augment.color_jitter must lie in 0..1, but it is {}", augment.color_jitter)
        })?;
        within("augment.repeats", augment.repeats as u64, 1, MAX_REPEATS)?;
        within("augment.padding", augment.padding as u64, 0, MAX_SIDE as u64)?;
        let [low, high] = augment.scale;
        require(low > 0.0 && low <= high && high <= 1.0, || {
            format!(
                "augment.scale = [{low}, {high}] must hold the smallest and the largest share of the image's area, above \
                 0 and at most 1: a crop is not larger than the image"
            )
        })?;
        let [low, high] = augment.ratio;
        require(low >= 1e-3 && low <= high && high <= 1e3, || {
            format!(
                "augment.ratio = [{low}, {high}] must hold the smallest and the largest width over height, in 0.001..1000"
            )
        })?;
        if rand_augment.is_some() {
            require(augment.color_jitter == 0.0, || {
                format!(
                    "augment.rand_augment = \"{}\" changes brightness, contrast and colour itself and excludes \
                     augment.color_jitter = {}; set one of them",
                    augment.rand_augment, augment.color_jitter
                )
            })?;
            require(!augment.three_augment, || {
                format!(
                    "augment.rand_augment = \"{}\" and augment.three_augment = true exclude each other; set one of them",
                    augment.rand_augment
                )
            })?;
        }
        if augment.crop == CropKind::Simple {
            require(resolution.aspect == AspectKind::Square, || {
                "augment.crop = \"simple\" cuts squares and needs resolution.aspect = \"square\"; at native aspect \
                 \"random-resized\" keeps the shape of its crops"
                    .into()
            })?;
            let (key, smallest) = match resolution.kind {
                ResolutionKind::Fixed => ("resolution.max", resolution.max),
                ResolutionKind::Native => ("model.patch", self.model.patch),
                _ => ("resolution.min", resolution.min),
            };
            require(augment.padding < smallest, || {
                format!(
                    "augment.padding = {} must be below {key} = {smallest}: an image is mirrored once, and a crop does \
                     not miss it",
                    augment.padding
                )
            })?;
        }
        let crop = self.eval.crop;
        require((0.0..=1.0).contains(&crop), || {
            format!(
                "eval.crop must lie in 0..1, but it is {crop}: a square of eval.resolution is cut from an image that is \
                 at least as large"
            )
        })?;
        require(crop == 0.0 || resolution.aspect == AspectKind::Square, || {
            format!(
                "eval.crop = {crop} cuts squares and needs resolution.aspect = \"square\"; set eval.crop = 0 to see the \
                 whole image at its own shape"
            )
        })?;
        require(crop == 0.0 || crop == 1.0 || resolution.kind != ResolutionKind::Native, || {
            format!(
                "eval.crop = {crop} enlarges images before it cuts them, and resolution.kind = \"native\" never does; set \
                 eval.crop to 0 or 1, or another kind"
            )
        })?;
        require(crop == 0.0 || crop >= 0.01, || {
            format!("eval.crop must be 0, for the whole image, or lie in 0.01..1, but it is {crop}")
        })
    }
}
