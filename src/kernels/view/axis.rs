//! How the pixels along one axis of a target come from those of a source: bicubic resizing as fast_image_resize 6 does it
//! (a = −0.5, antialiased: the filter widens with the reduction), in weights of 16 bits.

use std::ops::Range;

/// Binary places of a sum of weighted bytes: 32 bits without 8 of the result and 2 for what overshoots.
const MOST_PLACES: u32 = 32 - 8 - 2;
/// Radius of the filter in pixels, where nothing is reduced.
const RADIUS: f64 = 2.0;
/// Binary places of the weight 1 of pixels that are taken as they are.
const COPY_PLACES: u32 = 14;

/// Which pixels of the source one of the target is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tap {
    /// The first.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// Where their weights begin.
    pub weight: usize,
}

/// The pixels along an axis of a target: each is `(½ + Σ weight · pixel) >> places`, cut to 0..255.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis {
    /// Of each pixel of the target.
    pub taps: Vec<Tap>,
    /// Weights times 2^places.
    pub weights: Vec<i16>,
    /// Binary places of the weights, at least 1.
    pub places: u32,
}

impl Axis {
    /// The stretch of `length` pixels from `start` on of a source of `source` pixels, as `target` pixels.
    pub fn new(source: usize, start: f64, length: f64, target: usize) -> Self {
        // As the crate decides it: then this axis has no pass of its own.
        if length == target as f64 && start == start.round() {
            return Self::copied(start as usize..start as usize + target);
        }
        Self::resized(source, start, length, target)
    }

    /// Pixels as they are.
    pub fn copied(pixels: Range<usize>) -> Self {
        let taps = pixels.map(|first| Tap { first, count: 1, weight: 0 }).collect();
        Self { taps, weights: vec![1 << COPY_PLACES], places: COPY_PLACES }
    }

    fn resized(source: usize, start: f64, length: f64, target: usize) -> Self {
        // The order of the operations is the crate's, so that every weight is, to the last bit.
        let scale = (start + length - start) / target as f64;
        let widened = scale.max(1.0);
        let (radius, narrowing) = (RADIUS * widened, 1.0 / widened);
        let (mut taps, mut shares) = (Vec::with_capacity(target), Vec::<f64>::new());
        for x in 0..target {
            let centre = start + (x as f64 + 0.5) * scale;
            let first = (centre - radius).floor().max(0.0) as usize;
            let end = (centre + radius).ceil().min(source as f64) as usize;
            let share = |pixel: usize| bicubic((pixel as f64 - (centre - 0.5)) * narrowing);
            // Zeros at either end count for nothing.
            let first = (first..end).find(|&pixel| share(pixel) != 0.0).unwrap_or(end);
            let weight = shares.len();
            shares.extend((first..end).map(share));
            let sum: f64 = shares[weight..].iter().sum();
            let zeros = shares[weight..].iter().rev().take_while(|share| **share == 0.0).count();
            shares.truncate(shares.len() - zeros);
            if sum != 0.0 {
                shares[weight..].iter_mut().for_each(|share| *share /= sum);
            }
            taps.push(Tap { first, count: shares.len() - weight, weight });
        }
        // As many places as leave the largest weight 16 bits.
        let largest = shares.iter().copied().fold(0.0, f64::max);
        let scaled = |share: f64, places: u32| (share * f64::from(1u32 << places)).round();
        let fits = |places: &u32| scaled(largest, places + 1) < f64::from(1 << 15);
        let places = (0..MOST_PLACES - 1).find(|places| !fits(places)).unwrap_or(MOST_PLACES - 1);
        let weights = shares.iter().map(|&share| scaled(share, places) as i16).collect();
        Self { taps, weights, places }
    }

    /// The pixels at `chosen` of the target, in this order, each as often as it is named.
    pub fn chosen(mut self, chosen: &[usize]) -> Self {
        self.taps = chosen.iter().map(|&x| self.taps[x]).collect();
        self
    }

    /// From the last pixel to the first.
    pub fn reversed(mut self) -> Self {
        self.taps.reverse();
        self
    }

    /// The same for a source that begins at `first` of another.
    pub fn shifted(mut self, first: usize) -> Self {
        self.taps.iter_mut().for_each(|tap| tap.first += first);
        self
    }

    /// The pixels of the source that any of `taps` needs.
    pub fn needs(taps: &[Tap]) -> Range<usize> {
        let first = taps.iter().map(|tap| tap.first).min().unwrap_or(0);
        first..taps.iter().map(|tap| tap.first + tap.count).max().unwrap_or(0)
    }
}

/// The filter of Catmull and Rom, a = −0.5.
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_and_stay_inside() {
        for (source, start, length, target) in [
            (100, 0.0, 100.0, 7),
            (7, 0.0, 7.0, 100),
            (50, 10.25, 20.5, 33),
            (1, 0.0, 1.0, 5),
            (9, 3.000001, 4.0, 4),
        ] {
            let axis = Axis::new(source, start, length, target);
            assert_eq!(axis.taps.len(), target);
            for tap in &axis.taps {
                assert!(tap.count > 0 && tap.first + tap.count <= source, "{tap:?} of {source}");
                let sum: i32 = axis.weights[tap.weight..][..tap.count].iter().map(|&w| i32::from(w)).sum();
                let apart = (sum - (1 << axis.places)).abs();
                assert!(apart <= tap.count as i32, "{source} to {target}: {apart}");
            }
        }
    }

    #[test]
    fn what_is_not_resized_is_copied() {
        let axis = Axis::new(9, 3.0, 4.0, 4);
        assert_eq!(axis, Axis::copied(3..7));
        let chosen = axis.chosen(&[1, 0, 1, 2, 3, 2]).reversed();
        let first: Vec<usize> = chosen.taps.iter().map(|tap| tap.first).collect();
        assert_eq!(first, [5, 6, 5, 4, 3, 4]);
        assert_eq!((Axis::needs(&chosen.taps), Axis::needs(&chosen.taps[..2])), (3..7, 5..7));
    }
}
