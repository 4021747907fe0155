//! QK-norm of the rows of one head, forward and backward.
//!
//! With `rstd = 1/√(mean((x − μ)²) + ε)`, μ = 0 for RMS: `n = (x − μ)·rstd`, `y = n ⊙ γ + β`.
//! Backward with `g = dy ⊙ γ`: `dx = rstd·(g − mean(g) − n·mean(g ⊙ n))`, without the mean of g for
//! RMS; `dγ = Σ dy ⊙ n`, `dβ = Σ dy`.

use super::{AttentionConfig, QkAffineGrad};
use crate::cpu::real::Real;
use crate::cpu::simd::{add_assign, sum_by, sum2_by, vectorised};
use crate::recipe::QkNormKind;

/// Normalisation of the q (or k) rows of one head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadNorm<'a, R> {
    kind: QkNormKind,
    eps: R,
    gain: Option<&'a [R]>,
    bias: Option<&'a [R]>,
}

/// Gradients of one head's gain and bias, added to; each `[head_dim]`.
#[derive(Debug)]
pub(crate) struct HeadNormGrad<'a, R> {
    gain: &'a mut [R],
    bias: &'a mut [R],
}

impl<'a, R: Real> HeadNorm<'a, R> {
    /// The norm of head `head`, with `gain` and `bias` as in [`super::QkAffine`].
    pub fn new(config: &AttentionConfig, head: usize, gain: Option<&'a [R]>, bias: Option<&'a [R]>) -> Self {
        let of_head = |x: &'a [R]| {
            let start = if config.gain_per_head { head * config.head_dim } else { 0 };
            &x[start..start + config.head_dim]
        };
        Self { kind: config.norm, eps: R::of(config.eps), gain: gain.map(of_head), bias: bias.map(of_head) }
    }

    /// Normalises the rows `x[row_stride·r..][..width]` into the dense rows of `y`.
    pub fn forward(&self, y: &mut [R], x: &[R], row_stride: usize, width: usize) {
        vectorised(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(width).zip(x.chunks(row_stride)) {
                    self.forward_row(y, &x[..width]);
                }
            },
        );
    }

    /// Turns the gradient `dy` of one normalised row into that of `x`, in place.
    #[inline(always)]
    pub fn backward_row(&self, dy: &mut [R], x: &[R], grad: Option<&mut HeadNormGrad<'_, R>>) {
        let Some((mean, rstd)) = self.statistics(x) else { return };
        if let Some(grad) = grad {
            for ((dgain, dbias), (&dy, &x)) in
                grad.gain.iter_mut().zip(grad.bias.iter_mut()).zip(dy.iter().zip(x))
            {
                *dgain = (dy * rstd).mul_add(x - mean, *dgain);
                *dbias += dy;
            }
        }
        if let Some(gain) = self.gain {
            for (dy, &gain) in dy.iter_mut().zip(gain) {
                *dy *= gain;
            }
        }
        let count = R::of(dy.len() as f64);
        let along = rstd * sum2_by(dy, x, |g, x| g * (x - mean)) / count;
        let offset = if self.kind == QkNormKind::Rms { R::ZERO } else { sum_by(dy, |g| g) / count };
        for (dy, &x) in dy.iter_mut().zip(x) {
            *dy = rstd * (*dy - offset - (x - mean) * rstd * along);
        }
    }

    #[inline(always)]
    pub fn forward_row(&self, y: &mut [R], x: &[R]) {
        match self.statistics(x) {
            None => {
                y.copy_from_slice(x);
                return;
            }
            Some((mean, rstd)) => {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = (x - mean) * rstd;
                }
            }
        }
        if let Some(gain) = self.gain {
            for (y, &gain) in y.iter_mut().zip(gain) {
                *y *= gain;
            }
        }
        if let Some(bias) = self.bias {
            for (y, &bias) in y.iter_mut().zip(bias) {
                *y += bias;
            }
        }
    }

    /// μ and 1/σ of a row; none without a norm.
    #[inline(always)]
    fn statistics(&self, x: &[R]) -> Option<(R, R)> {
        let count = R::of(x.len() as f64);
        let mean = match self.kind {
            QkNormKind::None => return None,
            QkNormKind::Rms => R::ZERO,
            QkNormKind::LayerNorm | QkNormKind::LayerNormBias => sum_by(x, |x| x) / count,
        };
        let variance = sum_by(x, |x| (x - mean) * (x - mean)) / count;
        Some((mean, R::ONE / (variance + self.eps).sqrt()))
    }
}

/// Gradients of gains and biases in parts that are summed in one order: part `p` belongs to one
/// task and holds `[heads][γq, βq, γk, βk][head_dim]`, those of k at the number of the kv head.
#[derive(Debug)]
pub(crate) struct AffinePartial<R> {
    heads: usize,
    head_dim: usize,
    values: Vec<R>,
}

impl<R: Real> AffinePartial<R> {
    /// `parts` parts of zeros; parts are empty where no gradient is wanted.
    pub fn new(config: &AttentionConfig, parts: usize, wanted: &QkAffineGrad<'_, R>) -> Self {
        let any =
            [&wanted.q_gain, &wanted.k_gain, &wanted.q_bias, &wanted.k_bias].iter().any(|g| g.is_some());
        let len = if any && config.norm != QkNormKind::None {
            parts * config.heads * 4 * config.head_dim
        } else {
            0
        };
        Self { heads: config.heads, head_dim: config.head_dim, values: vec![R::ZERO; len] }
    }

    /// The parts, in order.
    pub fn parts(&mut self) -> impl Iterator<Item = &mut [R]> {
        let len = self.heads * 4 * self.head_dim;
        let mut rest = self.values.as_mut_slice();
        std::iter::from_fn(move || {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut_checked(len).unwrap_or_default();
            rest = tail;
            Some(part)
        })
    }

    /// Adds the sum of the parts to the gradients, part after part.
    pub fn add_to(self, config: &AttentionConfig, grad: QkAffineGrad<'_, R>) {
        let dim = self.head_dim;
        for (i, grad) in [grad.q_gain, grad.q_bias, grad.k_gain, grad.k_bias].into_iter().enumerate() {
            let Some(grad) = grad else { continue };
            let heads = if i < 2 { config.heads } else { config.kv_heads };
            for (at, values) in self.values.chunks_exact(4 * dim).enumerate() {
                let head = at % self.heads;
                if head >= heads {
                    continue;
                }
                let start = if config.gain_per_head { head * dim } else { 0 };
                add_assign(&mut grad[start..start + dim], &values[i * dim..][..dim]);
            }
        }
    }
}

/// The gradients of q's and k's norm of head `head` within a part.
pub(crate) fn of_head<R>(part: &mut [R], head: usize, head_dim: usize) -> Option<[HeadNormGrad<'_, R>; 2]> {
    if part.is_empty() {
        return None;
    }
    let (q, k) = part[head * 4 * head_dim..][..4 * head_dim].split_at_mut(2 * head_dim);
    Some([q, k].map(|both| {
        let (gain, bias) = both.split_at_mut(head_dim);
        HeadNormGrad { gain, bias }
    }))
}
