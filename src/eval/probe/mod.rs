//! Linear models on frozen features: what a representation is worth without training it. Pure functions of numbers, like
//! the [`metrics`](super::metrics) that judge them.

mod logistic;
mod ridge;

pub use logistic::{Fitted, Images, Sgd, fit};
pub use ridge::Ridge;

/// Added to standard deviations, so that a feature that never changes can be divided by its own (big_vision's value).
const LEAST: f64 = 1e-5;

/// Mean and standard deviation of each feature over some images.
#[derive(Clone, Debug, PartialEq)]
pub struct Standard {
    /// `[D]`.
    pub mean: Vec<f64>,
    /// `[D]`, of the images themselves (divided by their number), plus 1e-5.
    pub deviation: Vec<f64>,
}

impl Standard {
    /// That of the features `[D]` of each image.
    ///
    /// # Panics
    /// Without images: a bug of the caller.
    pub fn of<'a>(rows: impl Iterator<Item = &'a [f32]> + Clone) -> Self {
        let (images, width) = (rows.clone().count(), rows.clone().next().map_or(0, <[f32]>::len));
        assert!(images > 0, "features of some images");
        let mean_of = |of: &dyn Fn(usize, f64) -> f64| {
            let mut sums = vec![0.0; width];
            for row in rows.clone() {
                sums.iter_mut().zip(row).enumerate().for_each(|(i, (sum, &x))| *sum += of(i, f64::from(x)));
            }
            sums.iter_mut().for_each(|sum| *sum /= images as f64);
            sums
        };
        let mean = mean_of(&|_, x| x);
        let variance = mean_of(&|i, x| (x - mean[i]).powi(2));
        let deviation = variance.into_iter().map(|variance| variance.sqrt() + LEAST).collect();
        Self { mean, deviation }
    }

    /// The features `[D]` of an image with mean 0 and deviation 1, as far as they are like those that this is of.
    pub fn apply(&self, row: &[f32]) -> impl Iterator<Item = f64> {
        let scaled = row.iter().zip(self.mean.iter().zip(&self.deviation));
        scaled.map(|(&x, (mean, deviation))| (f64::from(x) - mean) / deviation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Weights;

    /// What tools/probe_goldens.py computed in f64 with numpy, rounded to f32.
    pub(super) fn golden(name: &str) -> (Vec<usize>, Vec<f32>) {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/probe.safetensors");
        let mut weights = Weights::load(path.as_ref()).unwrap();
        weights.tensors.remove(name).unwrap_or_else(|| panic!("{path} has {name}"))
    }

    pub(super) fn labels(name: &str) -> Vec<usize> {
        golden(name).1.iter().map(|&label| label as usize).collect()
    }

    #[track_caller]
    pub(super) fn close(got: impl IntoIterator<Item = f64>, want: &[f32], tolerance: f64) {
        let got: Vec<f64> = got.into_iter().collect();
        assert_eq!(got.len(), want.len());
        let scale = want.iter().fold(0f64, |most, x| most.max(f64::from(x.abs())));
        for (got, want) in got.iter().zip(want) {
            let off = (got - f64::from(*want)).abs();
            assert!(off <= tolerance * scale, "{got} instead of {want}");
        }
    }

    #[test]
    fn standard_by_hand() {
        // 1 and 5: mean 3, deviation 2; 7 and 7: deviation 0.
        let standard = Standard::of([1.0, 7.0, 5.0, 7.0].chunks(2));
        assert_eq!(
            (standard.mean.as_slice(), standard.deviation.as_slice()),
            (&[3.0, 7.0][..], &[2.0 + LEAST, LEAST][..])
        );
        let scaled: Vec<f64> = [1.0, 7.0, 7.0, 7.0].chunks(2).flat_map(|row| standard.apply(row)).collect();
        assert!((scaled[0] + 1.0).abs() < 1e-5 && (scaled[2] - 2.0).abs() < 2e-5, "{scaled:?}");
        assert_eq!((scaled[1], scaled[3]), (0.0, 0.0));
    }
}
