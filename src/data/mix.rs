//! Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899) by the rules of timm's `Mixup` 1.0.31
//! in its mode `elem`: λ, the choice between the two and the box are drawn for each image.
//!
//! timm mixes an image with the one at the mirrored place of its batch. Here an image's partner is any other of the
//! training set, drawn for it alone, so that what an image becomes does not depend on what it is packed with, on which
//! rank, or by how many workers. The partner is viewed as it would be if it were trained on in that epoch, at the size
//! of the first, so that any two images can be mixed whatever their shapes.

use std::ops::Range;

use rand::RngExt;
use rand_distr::Beta;

use crate::data::order::below;
use crate::recipe::MixConfig;
use crate::rng::{Purpose, Stream};

/// What an image is mixed with, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix {
    /// The other sample.
    pub partner: u64,
    /// What is done to the pixels.
    pub how: How,
}

/// What is done to the pixels.
#[derive(Clone, Debug, PartialEq)]
pub enum How {
    /// Mixup: each becomes so much of the image's own, and the rest of its partner's.
    Blend(f32),
    /// CutMix: those of the box are its partner's.
    Paste(Region),
}

/// A box of pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Pixel rows.
    pub rows: Range<usize>,
    /// Pixel columns.
    pub cols: Range<usize>,
}

impl Mix {
    /// What `sample` in `epoch` of a set of `samples` is mixed with, at `size` (height, width) in pixels. `None`: it
    /// stays as it is, by chance or since its λ leaves nothing to its partner.
    pub fn draw(
        config: &MixConfig,
        seed: u64,
        (epoch, sample): (u64, u64),
        samples: usize,
        size: (usize, usize),
    ) -> Option<Self> {
        if !config.is_on() || samples < 2 {
            return None;
        }
        let mut stream = Stream::new(seed, epoch, sample, Purpose::Mix);
        // Always as many draws, so that a probability changes whether an image is mixed, and not how.
        let mixed = f64::from(stream.uniform()) < config.prob;
        let switched = f64::from(stream.uniform()) < config.switch_prob;
        let cut = config.cutmix > 0.0 && (config.mixup == 0.0 || switched);
        let another = u64::from(below(&mut stream, samples as u32 - 1));
        let centre = (below(&mut stream, size.0 as u32) as usize, below(&mut stream, size.1 as u32) as usize);
        let alpha = if cut { config.cutmix } else { config.mixup };
        let share = stream.sample(Beta::new(alpha, alpha).ok()?) as f32;
        let how = if cut { How::Paste(region(share, size, centre)) } else { How::Blend(share) };
        let mix = Self { partner: (sample + 1 + another) % samples as u64, how };
        (mixed && mix.share(size) < 1.0).then_some(mix)
    }

    /// λ, how much of the target is the image's own: of CutMix the share of the pixels that stay.
    pub fn share(&self, (height, width): (usize, usize)) -> f32 {
        match &self.how {
            How::Blend(share) => *share,
            How::Paste(Region { rows, cols }) => {
                (1.0 - (rows.len() * cols.len()) as f64 / (height * width) as f64) as f32
            }
        }
    }

    /// Mixes `pixels` `[height, width, channels]` with those of its partner, of the same size.
    pub fn apply(&self, pixels: &mut [u8], partner: &[u8], width: usize, channels: usize) {
        match &self.how {
            How::Blend(share) => blend(pixels, partner, *share),
            How::Paste(region) => paste(pixels, partner, width, channels, region),
        }
    }
}

/// The box of CutMix: sides √(1 − λ) of the image's, rounded down, about `centre`, and of it what lies within the image
/// (timm 1.0.31, `rand_bbox`).
pub fn region(share: f32, (height, width): (usize, usize), centre: (usize, usize)) -> Region {
    let ratio = (1.0 - share).sqrt();
    let axis = |length: usize, centre: usize| {
        let cut = (length as f32 * ratio) as usize;
        centre.saturating_sub(cut / 2)..(centre + cut.div_ceil(2)).min(length)
    };
    Region { rows: axis(height, centre.0), cols: axis(width, centre.1) }
}

/// `share·pixels + (1 − share)·other`, rounded to the nearest: within half of 1/255 of what timm computes in floats.
pub fn blend(pixels: &mut [u8], other: &[u8], share: f32) {
    for (pixel, &other) in pixels.iter_mut().zip(other) {
        *pixel = (share * f32::from(*pixel) + (1.0 - share) * f32::from(other) + 0.5) as u8;
    }
}

/// Copies the box from `other`; both are `[height, width, channels]`.
pub fn paste(pixels: &mut [u8], other: &[u8], width: usize, channels: usize, region: &Region) {
    for row in region.rows.clone() {
        let line = (row * width + region.cols.start) * channels..(row * width + region.cols.end) * channels;
        pixels[line.clone()].copy_from_slice(&other[line]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: MixConfig =
        MixConfig { mixup: 0.8, cutmix: 1.0, prob: 1.0, switch_prob: 0.5, binarise: false };
    const SIZE: (usize, usize) = (48, 64);

    fn draw(config: &MixConfig, sample: u64) -> Option<Mix> {
        Mix::draw(config, 1, (2, sample), 100, SIZE)
    }

    #[test]
    fn an_image_is_never_its_own_partner_and_every_other_is() {
        let mut seen = [false; 10];
        for epoch in 0..500 {
            let Some(mix) = Mix::draw(&BOTH, 0, (epoch, 7), 10, SIZE) else { continue };
            seen[mix.partner as usize] = true;
        }
        assert_eq!(seen.iter().position(|seen| !seen), Some(7));
        assert_eq!(seen.iter().filter(|seen| **seen).count(), 9);
        assert_eq!(Mix::draw(&BOTH, 0, (0, 0), 1, SIZE), None, "nothing to mix with");
    }

    #[test]
    fn draws_repeat_and_differ_by_every_part_of_their_key() {
        let base = Mix::draw(&BOTH, 1, (2, 3), 1000, SIZE);
        assert_eq!(base, Mix::draw(&BOTH, 1, (2, 3), 1000, SIZE));
        for (seed, epoch, sample) in [(2, 2, 3), (1, 3, 3), (1, 2, 4)] {
            assert_ne!(base, Mix::draw(&BOTH, seed, (epoch, sample), 1000, SIZE));
        }
    }

    #[test]
    fn probabilities_choose() {
        type Kind = fn(&How) -> bool;
        let count = |config: &MixConfig, wanted: Kind| {
            (0..4000).filter_map(|sample| draw(config, sample)).filter(|mix| wanted(&mix.how)).count() as f64
                / 4000.0
        };
        let (blend, paste): (Kind, Kind) =
            (|how| matches!(how, How::Blend(_)), |how| matches!(how, How::Paste(_)));
        let seldom = MixConfig { prob: 0.3, switch_prob: 0.25, ..BOTH };
        // Five standard deviations are 0.034; a box of no pixel, which is none, is rarer.
        assert!((count(&seldom, blend) - 0.3 * 0.75).abs() < 0.04);
        assert!((count(&seldom, paste) - 0.3 * 0.25).abs() < 0.03);
        assert_eq!(count(&MixConfig { cutmix: 0.0, ..BOTH }, paste), 0.0);
        assert_eq!(count(&MixConfig { mixup: 0.0, switch_prob: 0.0, ..BOTH }, blend), 0.0);
        assert!(count(&MixConfig { mixup: 0.0, switch_prob: 0.0, ..BOTH }, paste) > 0.97);
        assert_eq!(count(&MixConfig { prob: 0.0, ..BOTH }, |_| true), 0.0);
    }

    #[test]
    fn lambda_follows_its_beta_distribution() {
        // Beta(α, α) has mean 1/2 and variance 1/(4(2α + 1)).
        for alpha in [0.2, 0.8, 3.0] {
            let config = MixConfig { mixup: alpha, cutmix: 0.0, ..BOTH };
            let shares: Vec<f64> = (0..20_000)
                .map(|sample| draw(&config, sample).map_or(1.0, |mix| f64::from(mix.share(SIZE))))
                .collect();
            let mean = shares.iter().sum::<f64>() / shares.len() as f64;
            let variance = shares.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / shares.len() as f64;
            assert!((mean - 0.5).abs() < 0.015, "{alpha}: {mean}");
            assert!((variance - 0.25 / (2.0 * alpha + 1.0)).abs() < 0.01, "{alpha}: {variance}");
        }
    }

    #[test]
    fn boxes_are_centred_anywhere_and_clipped() {
        let config = MixConfig { mixup: 0.0, ..BOTH };
        let mut at = [[0usize; 4]; 2];
        for sample in 0..20_000 {
            let Some(Mix { how: How::Paste(region), .. }) = draw(&config, sample) else { continue };
            assert!(region.rows.end <= SIZE.0 && region.cols.end <= SIZE.1);
            for (axis, range) in [region.rows, region.cols].into_iter().enumerate() {
                let length = [SIZE.0, SIZE.1][axis];
                if range.len() < length / 8 && range.start > 0 && range.end < length {
                    at[axis][range.start * 4 / length] += 1;
                }
            }
        }
        for counts in at {
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            assert!(*least > 20 && most < &(2 * least), "uniform over the image: {counts:?}");
        }
    }

    #[test]
    fn a_box_takes_what_its_lambda_leaves() {
        let region = region(0.75, (100, 60), (50, 30));
        assert_eq!((region.rows.clone(), region.cols.clone()), (25..75, 15..45));
        let mix = Mix { partner: 0, how: How::Paste(region) };
        assert_eq!(mix.share((100, 60)), 0.75);
        // At a corner half of each side is left; an odd side has its longer half after the centre.
        assert_eq!(super::region(0.75, (100, 60), (0, 59)), Region { rows: 0..25, cols: 44..60 });
        assert_eq!(super::region(0.0, (7, 5), (3, 2)), Region { rows: 0..7, cols: 0..5 });
        assert_eq!(super::region(1.0, (7, 5), (3, 2)), Region { rows: 3..3, cols: 2..2 });
    }
}
