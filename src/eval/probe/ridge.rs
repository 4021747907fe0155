//! Ridge regression onto ±1, in closed form and in f64: the few-shot evaluation of big_vision (`fewshot_lsr`).
//!
//! Features are standardised over the N images that it is fitted on, X [N, D]; a target is 1 for the image's class and −1
//! for the K − 1 others, Y [N, K]; a constant column of 100 takes the bias, which so is hardly regularised. That column is
//! orthogonal to the centred X, so the normal equations fall apart:
//!
//! W = (XᵀX + λI)⁻¹ XᵀY = Xᵀ(XXᵀ + λI)⁻¹ Y,  b = 100² ΣY / (100² N + λ)
//!
//! of which the smaller system is solved, by Cholesky. big_vision takes an eigendecomposition instead, for the same W.

use rayon::prelude::*;

use super::Standard;
use crate::cpu::gemm::{Mat, MatMut, gemm};

/// Value of the constant column.
const BIAS: f64 = 100.0;

/// The images that it is fitted on, whatever the regularisation.
pub struct Ridge {
    standard: Standard,
    classes: usize,
    labels: Vec<usize>,
    side: Side,
    /// XᵀX or XXᵀ, the smaller.
    products: Vec<f64>,
}

/// What the smaller system needs beside its products.
enum Side {
    /// N ≥ D: XᵀY `[D, K]`, which the sums of each class give; Y itself is never held.
    Features(Vec<f64>),
    /// N < D: X `[N, D]`.
    Images(Vec<f64>),
}

/// A fitted regression, for features as they are.
#[derive(Clone, Debug, PartialEq)]
pub struct Regression {
    /// `[D, K]`.
    pub weights: Vec<f64>,
    /// `[K]`.
    pub bias: Vec<f64>,
}

impl Ridge {
    /// Of the features `[D]` of each image with their classes.
    ///
    /// # Panics
    /// Without images: a bug of the caller.
    pub fn new<'a>(rows: impl Iterator<Item = &'a [f32]> + Clone, labels: &[usize], classes: usize) -> Self {
        let standard = Standard::of(rows.clone());
        let x: Vec<f64> = rows.flat_map(|row| standard.apply(row)).collect();
        let (images, width) = (labels.len(), standard.mean.len());
        let matrix = Mat::new(&x, images, width, width);
        let size = images.min(width);
        let mut products = vec![0.0; size * size];
        let (left, right) = if images >= width { (matrix.t(), matrix) } else { (matrix, matrix.t()) };
        gemm(MatMut::new(&mut products, size, size, size), false, 1.0, left, right, true);
        let side =
            if images >= width { Side::Features(xty(&x, labels, width, classes)) } else { Side::Images(x) };
        Self { standard, classes, labels: labels.to_vec(), side, products }
    }

    /// The regression with λ = `l2` > 0; none where it is so small that rounding leaves the system without a solution.
    pub fn solve(&self, l2: f64) -> Option<Regression> {
        let (width, classes) = (self.standard.mean.len(), self.classes);
        let (images, size) = (self.labels.len(), self.labels.len().min(width));
        let mut factor = self.products.clone();
        (0..size).for_each(|i| factor[i * size + i] += l2);
        cholesky(&mut factor, size)?;
        // W of standardised features.
        let mut weights = match &self.side {
            Side::Features(xty) => {
                let mut weights = xty.clone();
                substitute(&factor, &mut weights, classes);
                weights
            }
            Side::Images(x) => {
                let mut dual = vec![-1.0; images * classes];
                let targets = dual.chunks_exact_mut(classes).zip(&self.labels);
                targets.for_each(|(y, label)| y[*label] = 1.0);
                substitute(&factor, &mut dual, classes);
                let mut weights = vec![0.0; width * classes];
                let out = MatMut::new(&mut weights, width, classes, classes);
                let x = Mat::new(x, images, width, width);
                gemm(out, false, 1.0, x.t(), Mat::new(&dual, images, classes, classes), true);
                weights
            }
        };
        let mut bias = vec![-(images as f64); classes];
        self.labels.iter().for_each(|label| bias[*label] += 2.0);
        bias.iter_mut().for_each(|bias| *bias *= BIAS * BIAS / (BIAS * BIAS * images as f64 + l2));
        // Of features as they are: (x − μ) / σ · W = x · (W / σ) − (μ / σ) · W.
        let Standard { mean, deviation } = &self.standard;
        for (row, (mean, deviation)) in weights.chunks_exact_mut(classes).zip(mean.iter().zip(deviation)) {
            for (weight, bias) in row.iter_mut().zip(&mut bias) {
                *weight /= deviation;
                *bias -= mean * *weight;
            }
        }
        Some(Regression { weights, bias })
    }
}

/// XᵀY `[D, K]` of `x` `[N, D]`: for each class twice the sum of its images minus that of all.
fn xty(x: &[f64], labels: &[usize], width: usize, classes: usize) -> Vec<f64> {
    let mut products = vec![0.0; width * classes];
    let mut all = vec![0.0; width];
    for (row, label) in x.chunks_exact(width).zip(labels) {
        for (feature, x) in row.iter().enumerate() {
            products[feature * classes + label] += 2.0 * x;
            all[feature] += x;
        }
    }
    for (row, all) in products.chunks_exact_mut(classes).zip(all) {
        row.iter_mut().for_each(|product| *product -= all);
    }
    products
}

impl Regression {
    /// What it says of `features` `[images, D]`, `[images, K]`.
    pub fn scores(&self, features: &[f64]) -> Vec<f64> {
        let classes = self.bias.len();
        let width = self.weights.len() / classes;
        let images = features.len() / width;
        let mut scores = self.bias.repeat(images);
        let out = MatMut::new(&mut scores, images, classes, classes);
        let features = Mat::new(features, images, width, width);
        gemm(out, true, 1.0, features, Mat::new(&self.weights, width, classes, classes), true);
        scores
    }
}

/// L in the lower triangle of the symmetric `a` `[size, size]` = LLᵀ, column by column; none where `a` is not positive
/// definite.
fn cholesky(a: &mut [f64], size: usize) -> Option<()> {
    for j in 0..size {
        let (above, below) = a.split_at_mut((j + 1) * size);
        let row = &mut above[j * size..][..=j];
        let pivot = row[j] - dot(&row[..j], &row[..j]);
        // NaN is no pivot either.
        if pivot.is_nan() || pivot <= 0.0 {
            return None;
        }
        row[j] = pivot.sqrt();
        let row = &*row;
        let eliminate = |other: &mut [f64]| other[j] = (other[j] - dot(&other[..j], &row[..j])) / row[j];
        // A column is worth sharing out where its products are many.
        match j * (size - j) {
            0..100_000 => below.chunks_exact_mut(size).for_each(eliminate),
            _ => below.par_chunks_exact_mut(size).for_each(eliminate),
        }
    }
    Some(())
}

/// Solves LLᵀ·x = `b` `[size, columns]` in place.
fn substitute(factor: &[f64], b: &mut [f64], columns: usize) {
    let size = b.len() / columns;
    let subtract = |row: &mut [f64], other: &[f64], times: f64| {
        row.iter_mut().zip(other).for_each(|(row, other)| *row -= times * other);
    };
    for i in 0..size {
        let (before, rest) = b.split_at_mut(i * columns);
        let row = &mut rest[..columns];
        for (other, times) in before.chunks_exact(columns).zip(&factor[i * size..]) {
            subtract(row, other, *times);
        }
        row.iter_mut().for_each(|x| *x /= factor[i * size + i]);
    }
    for i in (0..size).rev() {
        let (rest, after) = b.split_at_mut((i + 1) * columns);
        let row = &mut rest[i * columns..];
        for (j, other) in after.chunks_exact(columns).enumerate() {
            subtract(row, other, factor[(i + 1 + j) * size + i]);
        }
        row.iter_mut().for_each(|x| *x /= factor[i * size + i]);
    }
}

/// Σ a·b over eight sums, which processors add side by side.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::super::tests::{close, golden, labels};
    use super::*;

    /// More images than features and fewer: both ways to the closed form, of the formulas as big_vision prints them.
    #[test]
    fn as_numpy_solves_it() {
        for case in ["many", "few"] {
            let (shape, features) = golden(&format!("{case}.features"));
            let classes = 4;
            let labels = labels(&format!("{case}.labels"));
            let ridge = Ridge::new(features.chunks(shape[1]), &labels, classes);
            let others: Vec<f64> = golden("others").1.into_iter().map(f64::from).collect();
            for l2 in [1, 1024] {
                let scores = ridge.solve(f64::from(l2)).unwrap().scores(&others);
                close(scores, &golden(&format!("{case}.scores {l2}")).1, 1e-6);
            }
        }
    }

    #[test]
    fn one_feature_by_hand() {
        // Standardised −1 and 1 of classes 0 and 1: w = ∓2 / (2 + λ), no bias.
        let regression = Ridge::new([2.0, 4.0].chunks(1), &[0, 1], 2).solve(2.0).unwrap();
        let scores = regression.scores(&[2.0, 4.0, 3.0]);
        for (got, want) in scores.iter().zip([0.5, -0.5, -0.5, 0.5, 0.0, 0.0]) {
            assert!((got - want).abs() < 1e-4, "{scores:?}");
        }
    }

    #[test]
    fn a_factor_by_hand() {
        let mut a = [4.0, 9.0, 2.0, 10.0];
        assert_eq!(cholesky(&mut a, 2), Some(()));
        // Above the diagonal nothing is read or written.
        assert_eq!(a, [2.0, 9.0, 1.0, 3.0]);
        let mut b = [8.0, 4.0, 22.0, 2.0];
        substitute(&a, &mut b, 2);
        assert_eq!(b, [1.0, 1.0, 2.0, 0.0]);
        assert_eq!(cholesky(&mut [1.0, 2.0, 2.0, 1.0], 2), None, "not positive definite");
        assert_eq!(cholesky(&mut [f64::NAN], 1), None);
    }

    /// Large enough for columns to be shared out.
    #[test]
    fn a_large_factor_gives_the_matrix_again() {
        let size = 700;
        let of = |i: usize, j: usize| ((i * 37 + j * 101) % 17) as f64 / 17.0;
        let mut a = vec![0.0; size * size];
        for i in 0..size {
            for j in 0..size {
                a[i * size + j] = 0.5 * (of(i, j) + of(j, i)) + if i == j { 400.0 } else { 0.0 };
            }
        }
        let mut factor = a.clone();
        cholesky(&mut factor, size).unwrap();
        for (i, j) in [(0, 0), (699, 0), (699, 698), (350, 349), (699, 699)] {
            let product = dot(&factor[i * size..][..=j], &factor[j * size..][..=j]);
            assert!((product - a[i * size + j]).abs() < 1e-9, "{i} {j}");
        }
    }
}
