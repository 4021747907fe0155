//! Losses of pairs of images and texts, with their gradients, in chunks: no more than [`CHUNK`]² scores are held by
//! a thread at a time, so beside the normalised vectors memory grows with N (NaViT, section 3.3).
//!
//! With x̂ = x / √(‖x‖² + ε) for an image, ŷ for a text, and the score s_ij = e^scale x̂_i·ŷ_j (+ bias):
//!
//! * softmax (CLIP): `loss_i = ½ (lse_j s_ij − s_ii) + ½ (lse_j s_ji − s_ii)`;
//! * sigmoid (SigLIP): `loss_i = Σ_j ln(1 + e^(−z_ij s_ij))` with z_ij = 1 for i = j and −1 elsewhere.
//!
//! A first sweep keeps of every row and column its log-sum, joined chunk by chunk; a second computes the scores
//! again, and from them with weights w and the factor c of the gradient:
//!
//! * softmax: `ds_ij = ½c (w_i (e^(s_ij − lse_i) − δ_ij) + w_j (e^(s_ij − lse'_j) − δ_ij))`;
//! * sigmoid: `ds_ij = −c w_i z_ij σ(−z_ij s_ij)`;
//! * `dx̂_i = e^scale Σ_j ds_ij ŷ_j`, `dx = (dx̂ − x̂ (x̂·dx̂)) / √(‖x‖² + ε)`, likewise for texts;
//! * `dscale = Σ_ij ds_ij e^scale x̂_i·ŷ_j`, `dbias = Σ_ij ds_ij`.
//!
//! Rows and columns are treated alike and apart: [`Scores::statistics`] and [`Scores::gradient`] work on the vectors
//! of one side and add what some vectors of the other contribute, whose pairs may be others than those of the first.
//! Pairs of weight 0 take part in nothing and have gradient 0.

mod scores;

pub use scores::{Known, Scores, Side, Statistics, Sums, Vectors};

use super::real::Real;
use super::scratch::with_scratch;
use super::simd::{add_scaled, for_each, sum2_by, vectorised};
use crate::ops::ContrastiveKind;

/// Vectors of a side that are compared with as many of the other at a time.
pub const CHUNK: usize = 64;

/// Added to the squared norm, so that a vector of zeros has a direction of zeros.
pub const EPS: f64 = 1e-12;

/// The rows of pairs that count, of length 1.
struct Unit<R> {
    rows: Vec<R>,
    /// 1 / √(‖x‖² + ε).
    inverse: Vec<R>,
    width: usize,
}

impl<R: Real> Unit<R> {
    fn new(x: &[R], pairs: &[usize], width: usize) -> Self {
        let mut rows = vec![R::ZERO; pairs.len() * width];
        let mut inverse = vec![R::ZERO; pairs.len()];
        for_each(rows.chunks_mut(width.max(1)).zip(&mut inverse).zip(pairs), |((unit, inverse), &at)| {
            let x = &x[at * width..][..width];
            vectorised(
                #[inline(always)]
                || {
                    *inverse = R::ONE / (sum2_by(x, x, |a, b| a * b) + R::of(EPS)).sqrt();
                    unit.iter_mut().zip(x).for_each(|(unit, &x)| *unit = x * *inverse);
                },
            );
        });
        Self { rows, inverse, width }
    }

    fn vectors(&self) -> Vectors<'_, R> {
        Vectors { unit: &self.rows, width: self.width, first: 0 }
    }

    /// Writes the gradient by the vectors themselves, from that by `rows`, which it uses up; others are zeros.
    fn gradient(&self, dx: &mut [R], mut dunit: Vec<R>, pairs: &[usize]) {
        let width = self.width.max(1);
        let rows = dunit.chunks_mut(width).zip(self.rows.chunks(width)).zip(&self.inverse);
        for_each(rows, |((d, unit), &inverse)| {
            vectorised(
                #[inline(always)]
                || {
                    let along = sum2_by(d, unit, |a, b| a * b);
                    add_scaled(d, -along, unit);
                    d.iter_mut().for_each(|d| *d *= inverse);
                },
            );
        });
        dx.fill(R::ZERO);
        for (d, &at) in dunit.chunks(width).zip(pairs) {
            dx[at * width..][..width].copy_from_slice(d);
        }
    }
}

/// Numbers of the pairs whose weight is not 0.
fn counted(rows: usize, weights: &[f32]) -> Vec<usize> {
    (0..rows).filter(|&i| weights[i] != 0.0).collect()
}

/// What [`contrastive`] writes.
#[derive(Debug)]
pub struct Results<'a, R> {
    /// `[N]`: weight × loss of each pair.
    pub per_pair: &'a mut [R],
    /// `[N, D]`.
    pub dimages: &'a mut [R],
    /// `[N, D]`.
    pub dtexts: &'a mut [R],
    /// One number.
    pub dscale: &'a mut R,
    /// One number, where there is a bias.
    pub dbias: Option<&'a mut R>,
}

/// The loss of the pairs (images_i, texts_i), rows of N vectors of any length, and the gradient of
/// `loss_scale · Σ per_pair`. `scale` is the logarithm of the factor on the scores. `weights` may hold more slots
/// than there are pairs.
#[allow(clippy::too_many_arguments)]
pub fn contrastive<R: Real>(
    results: Results<'_, R>,
    images: &[R],
    texts: &[R],
    scale: R,
    bias: Option<R>,
    weights: &[f32],
    kind: ContrastiveKind,
    loss_scale: f64,
) {
    let rows = results.per_pair.len();
    let width = images.len().checked_div(rows).unwrap_or(0);
    let pairs = counted(rows, weights);
    let (images, texts) = (Unit::new(images, &pairs, width), Unit::new(texts, &pairs, width));
    let scores = Scores { kind, factor: scale.exp(), bias: bias.unwrap_or(R::ZERO) };

    let mut by_image = vec![Statistics::new(); pairs.len()];
    scores.statistics(&mut by_image, images.vectors(), texts.vectors());
    let mut by_text = Vec::new();
    if kind == ContrastiveKind::Softmax {
        by_text.resize(pairs.len(), Statistics::new());
        scores.statistics(&mut by_text, texts.vectors(), images.vectors());
    }
    results.per_pair.fill(R::ZERO);
    for (i, &at) in pairs.iter().enumerate() {
        let loss = match kind {
            ContrastiveKind::Softmax => {
                R::of(0.5) * (by_image[i].cross_entropy() + by_text[i].cross_entropy())
            }
            ContrastiveKind::Sigmoid => by_image[i].loss,
        };
        results.per_pair[at] = R::of(f64::from(weights[at])) * loss;
    }

    let weights: Vec<R> = pairs.iter().map(|&at| R::of(f64::from(weights[at]) * loss_scale)).collect();
    let log_sums = |of: &[Statistics<R>]| of.iter().map(Statistics::log_sum).collect::<Vec<R>>();
    let (by_image, by_text) = (log_sums(&by_image), log_sums(&by_text));
    let of_images = (images.vectors(), Known { log_sums: &by_image, weights: &weights });
    let of_texts = (texts.vectors(), Known { log_sums: &by_text, weights: &weights });
    let gradient = |side, own, others| {
        let mut dunit = vec![R::ZERO; pairs.len() * width];
        let mut sums = vec![[R::ZERO; 2]; pairs.len()];
        scores.gradient(side, &mut dunit, &mut sums, own, others);
        (dunit, sums)
    };
    let (dunit, sums) = gradient(Side::Images, of_images, of_texts);
    images.gradient(results.dimages, dunit, &pairs);
    *results.dscale = sums.iter().map(|sums| sums[0]).sum();
    if let Some(dbias) = results.dbias {
        *dbias = sums.iter().map(|sums| sums[1]).sum();
    }
    let (dunit, _) = gradient(Side::Texts, of_texts, of_images);
    texts.gradient(results.dtexts, dunit, &pairs);
}

/// Elements that [`contrastive`] holds beside its operands and results, for N pairs of width D, all of which count:
/// the normalised vectors, one gradient by them, statistics and one tile of scores.
pub fn scratch(pairs: usize, width: usize) -> usize {
    3 * pairs * width + 16 * pairs + CHUNK * CHUNK
}

/// For each image how many texts are ahead of its own by the angle between the vectors (0: retrieved), −1 at
/// weight 0. Equal ones rank by their number, NaN above everything; an image whose own angle is NaN has `i32::MAX`.
pub fn retrieved<R: Real>(images: &[R], texts: &[R], weights: &[f32], width: usize) -> Vec<i32> {
    let rows = images.len().checked_div(width).unwrap_or(0);
    let pairs = counted(rows, weights);
    let (images, texts) = (Unit::new(images, &pairs, width), Unit::new(texts, &pairs, width));
    let scores = Scores { kind: ContrastiveKind::Softmax, factor: R::ONE, bias: R::ZERO };
    let mut ahead = vec![0i32; pairs.len()];
    for_each(ahead.chunks_mut(CHUNK).zip(images.vectors().parts()), |(ahead, (at, images))| {
        let mut own = [R::ZERO; CHUNK];
        with_scratch([CHUNK * CHUNK], |[tile]| {
            let m = images.rows();
            scores.tile(tile, images, texts.vectors().part(at));
            own[..m].iter_mut().enumerate().for_each(|(i, own)| *own = tile[i * m + i]);
            for (from, texts) in texts.vectors().parts() {
                scores.tile(tile, images, texts);
                for (i, row) in tile.chunks_exact(texts.rows()).take(m).enumerate() {
                    let before = |(j, s): (usize, &R)| {
                        // Written as "not smaller", so that a comparison with NaN counts against the image.
                        let behind = *s < own[i] || (*s == own[i] && from + j > at + i);
                        i32::from(from + j != at + i && !behind)
                    };
                    ahead[i] += row.iter().enumerate().map(before).sum::<i32>();
                }
            }
            #[allow(clippy::eq_op)] // NaN alone differs from itself.
            ahead.iter_mut().zip(own).filter(|(_, own)| own != own).for_each(|(ahead, _)| *ahead = i32::MAX);
        });
    });
    let mut ranks = vec![-1; rows];
    for (&at, ahead) in pairs.iter().zip(ahead) {
        ranks[at] = ahead;
    }
    ranks
}
