//! Scores of the vectors of one side with those of the other, and what one side makes of them, a tile at a time.

use super::CHUNK;
use crate::cpu::gemm::{Mat, MatMut, gemm};
use crate::cpu::real::Real;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{for_each, largest, sum_by, vectorised};
use crate::ops::ContrastiveKind;

/// How vectors are compared.
#[derive(Clone, Copy, Debug)]
pub struct Scores<R> {
    /// Softmax or sigmoid.
    pub kind: ContrastiveKind,
    /// e^scale.
    pub factor: R,
    /// Added to every score.
    pub bias: R,
}

/// Whose gradient is computed; the weight of a combination is that of its image for the sigmoid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Images against texts.
    Images,
    /// Texts against images.
    Texts,
}

/// Some vectors of one side.
#[derive(Clone, Copy, Debug)]
pub struct Vectors<'a, R> {
    /// `[n, D]`, of length 1.
    pub unit: &'a [R],
    /// Columns D.
    pub width: usize,
    /// Number of the pair of row 0 among all pairs.
    pub first: usize,
}

impl<'a, R> Vectors<'a, R> {
    pub(super) fn rows(&self) -> usize {
        self.unit.len().checked_div(self.width).unwrap_or(0)
    }

    pub(super) fn part(&self, from: usize) -> Vectors<'a, R> {
        let to = (from + CHUNK).min(self.rows());
        Vectors { unit: &self.unit[from * self.width..to * self.width], first: self.first + from, ..*self }
    }

    pub(super) fn parts(self) -> impl Iterator<Item = (usize, Vectors<'a, R>)> {
        (0..self.rows()).step_by(CHUNK).map(move |from| (from, self.part(from)))
    }
}

/// What the scores of one vector come to.
#[derive(Clone, Copy, Debug)]
pub struct Statistics<R> {
    /// The largest score so far.
    pub largest: R,
    /// Σ e^(score − largest).
    pub sum: R,
    /// The score with the vector's own pair, once it has been met.
    pub pair: R,
    /// Σ ln(1 + e^(−z s)); of the sigmoid.
    pub loss: R,
}

impl<R: Real> Statistics<R> {
    /// Before any score.
    pub fn new() -> Self {
        let none = R::of(f64::NEG_INFINITY);
        Self { largest: none, sum: R::ZERO, pair: R::of(f64::NAN), loss: R::ZERO }
    }

    /// Logarithm of the sum of exponentials.
    pub fn log_sum(&self) -> R {
        self.largest + self.sum.ln()
    }

    /// `lse − pair`, without a difference of large numbers.
    pub(super) fn cross_entropy(&self) -> R {
        (self.largest - self.pair) + self.sum.ln()
    }

    #[inline(always)]
    fn join(&mut self, kind: ContrastiveKind, scores: &[R], pair: Option<usize>) {
        self.pair = pair.map_or(self.pair, |at| scores[at]);
        match kind {
            ContrastiveKind::Softmax => {
                // A NaN that is passed over here is in the sum.
                let top = match largest(scores) {
                    Some(top) if top > self.largest => top,
                    _ => self.largest,
                };
                // Nothing yet: −∞ less −∞ is no number.
                let kept = if self.sum > R::ZERO { (self.largest - top).exp() } else { R::ONE };
                let sum = sum_by(
                    scores,
                    #[inline(always)]
                    |s| (s - top).exp(),
                );
                (self.largest, self.sum) = (top, self.sum * kept + sum);
            }
            ContrastiveKind::Sigmoid => {
                let of_pair = pair.map_or(R::ZERO, |at| softplus(-scores[at]));
                let (before, after) = scores.split_at(pair.unwrap_or(scores.len()));
                for others in [before, after.get(1..).unwrap_or_default()] {
                    self.loss += sum_by(
                        others,
                        #[inline(always)]
                        |s| softplus(s),
                    );
                }
                self.loss += of_pair;
            }
        }
    }
}

/// ln(1 + e^x).
#[inline(always)]
fn softplus<R: Real>(x: R) -> R {
    x.max(R::ZERO) + (-x.max(-x)).exp().ln_1p()
}

impl<R: Real> Default for Statistics<R> {
    fn default() -> Self {
        Self::new()
    }
}

/// What the gradient needs to know of each vector of a side.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a, R> {
    /// Logarithms of the sums of exponentials; not read for the sigmoid.
    pub log_sums: &'a [R],
    /// Weight × factor of the gradient.
    pub weights: &'a [R],
}

/// Of each vector: Σ ds·(s − bias) and Σ ds, over what it has been compared with.
pub type Sums<R> = [R; 2];

impl<R: Real> Scores<R> {
    /// `tile[own, others]`, the scores of some vectors with others.
    pub(super) fn tile(&self, tile: &mut [R], own: Vectors<'_, R>, others: Vectors<'_, R>) {
        let (m, n, d) = (own.rows(), others.rows(), own.width);
        let (a, b) = (Mat::new(own.unit, m, d, d), Mat::new(others.unit, n, d, d));
        gemm(MatMut::new(tile, m, n, n), false, self.factor, a, b.t(), false);
        tile[..m * n].iter_mut().for_each(|s| *s += self.bias);
    }

    /// Adds to the statistics of each of `own` its scores with `others`.
    pub fn statistics(&self, statistics: &mut [Statistics<R>], own: Vectors<'_, R>, others: Vectors<'_, R>) {
        for_each(statistics.chunks_mut(CHUNK).zip(own.parts()), |(statistics, (_, own))| {
            with_scratch([CHUNK * CHUNK], |[tile]| {
                for (_, others) in others.parts() {
                    let n = others.rows();
                    self.tile(tile, own, others);
                    vectorised(
                        #[inline(always)]
                        || {
                            for (i, (row, scores)) in
                                statistics.iter_mut().zip(tile.chunks_exact(n)).enumerate()
                            {
                                row.join(self.kind, scores, pair(own, i, others));
                            }
                        },
                    );
                }
            });
        });
    }

    /// Adds to `dunit[own, D]`, the gradient by the normalised vectors of `side`, and to `sums` what `others`
    /// contribute.
    pub fn gradient(
        &self,
        side: Side,
        dunit: &mut [R],
        sums: &mut [Sums<R>],
        (own, of_own): (Vectors<'_, R>, Known<'_, R>),
        (others, of_others): (Vectors<'_, R>, Known<'_, R>),
    ) {
        let width = own.width;
        let tasks = dunit.chunks_mut(CHUNK * width.max(1)).zip(sums.chunks_mut(CHUNK)).zip(own.parts());
        for_each(tasks, |((dunit, sums), (at, own))| {
            with_scratch([CHUNK * CHUNK], |[tile]| {
                for (from, others) in others.parts() {
                    let (m, n) = (own.rows(), others.rows());
                    self.tile(tile, own, others);
                    vectorised(
                        #[inline(always)]
                        || {
                            for (i, (row, sums)) in tile.chunks_exact_mut(n).zip(sums.iter_mut()).enumerate()
                            {
                                let pair = pair(own, i, others);
                                self.derive(side, row, sums, pair, (of_own, at + i), (of_others, from));
                            }
                        },
                    );
                    let (ds, unit) = (Mat::new(tile, m, n, n), Mat::new(others.unit, n, width, width));
                    gemm(MatMut::new(dunit, m, width, width), true, self.factor, ds, unit, false);
                }
            });
        });
    }

    /// Replaces a row of scores by ds and adds to its sums.
    #[inline(always)]
    fn derive(
        &self,
        side: Side,
        row: &mut [R],
        sums: &mut Sums<R>,
        pair: Option<usize>,
        (own, at): (Known<'_, R>, usize),
        (others, from): (Known<'_, R>, usize),
    ) {
        let weights = &others.weights[from..][..row.len()];
        let own_weight = own.weights[at];
        let (mut weighted, mut plain) = (R::ZERO, R::ZERO);
        match self.kind {
            ContrastiveKind::Softmax => {
                let half = R::of(0.5);
                let own_sum = own.log_sums[at];
                let log_sums = &others.log_sums[from..][..row.len()];
                for (j, (s, (&log_sum, &weight))) in
                    row.iter_mut().zip(log_sums.iter().zip(weights)).enumerate()
                {
                    let target = if pair == Some(j) { R::ONE } else { R::ZERO };
                    let (by_row, by_column) = ((*s - own_sum).exp() - target, (*s - log_sum).exp() - target);
                    let ds = half * (own_weight * by_row + weight * by_column);
                    weighted += ds * (*s - self.bias);
                    plain += ds;
                    *s = ds;
                }
            }
            ContrastiveKind::Sigmoid => {
                for (j, (s, &weight)) in row.iter_mut().zip(weights).enumerate() {
                    let z = if pair == Some(j) { -R::ONE } else { R::ONE };
                    // σ(z s), whose exponential never overflows.
                    let zs = z * *s;
                    let small = (-zs.max(-zs)).exp();
                    let numerator = if zs >= R::ZERO { R::ONE } else { small };
                    let weight = if side == Side::Images { own_weight } else { weight };
                    let ds = weight * z * (numerator / (R::ONE + small));
                    weighted += ds * (*s - self.bias);
                    plain += ds;
                    *s = ds;
                }
            }
        }
        sums[0] += weighted;
        sums[1] += plain;
    }
}

/// Where among `others` the pair of row `i` of `own` is.
#[inline(always)]
fn pair<R>(own: Vectors<'_, R>, i: usize, others: Vectors<'_, R>) -> Option<usize> {
    (own.first + i).checked_sub(others.first).filter(|&at| at < others.rows())
}
