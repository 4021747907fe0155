//! One head of one image: blocks of query rows against all keys.

use std::ops::Range;

use super::qk_norm::{HeadNorm, of_head};
use super::{AttentionConfig, QkAffine};
use crate::cpu::gemm::{Mat, MatMut, gemm};
use crate::cpu::real::Real;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{sum2_by, vectorised};
use crate::cpu::softmax::{exp_grad_row, exp_row, padded};

/// Query rows whose scores are held at a time.
const BLOCK_ROWS: usize = 128;

/// The operands of all heads of a batch.
#[derive(Debug)]
pub(super) struct Heads<'a, R> {
    pub config: &'a AttentionConfig,
    pub qkv: &'a [R],
    pub affine: QkAffine<'a, R>,
}

/// What the backward pass knows of the forward pass's results, each `[T, …]` as there.
#[derive(Debug)]
pub(super) struct Results<'a, R> {
    pub dout: &'a [R],
    pub out: &'a [R],
    pub lse: &'a [R],
}

/// Gradients of one head, dense rows of `head_dim`: of normalised q and k, and of v.
#[derive(Debug)]
pub(super) struct HeadGrad<'a, R> {
    pub dq: &'a mut [R],
    pub dk: &'a mut [R],
    pub dv: &'a mut [R],
}

/// Where the gradients of some token rows go, all heads.
#[derive(Debug)]
pub(super) struct RowGrad<'a, R> {
    /// Tokens.
    pub rows: Range<usize>,
    /// Their rows of dqkv.
    pub dqkv: &'a mut [R],
    /// Their part of the gradients of gains and biases; may be empty.
    pub affine: &'a mut [R],
}

/// One head of one image.
#[derive(Debug)]
pub(super) struct Head<'a, R> {
    config: &'a AttentionConfig,
    index: usize,
    qkv: &'a [R],
    q_norm: HeadNorm<'a, R>,
    k_norm: HeadNorm<'a, R>,
    image: Range<usize>,
}

impl<'a, R: Real> Heads<'a, R> {
    /// Head `index` of the image with tokens `image`.
    pub fn get(&self, index: usize, image: Range<usize>) -> Head<'a, R> {
        let affine = self.affine;
        Head {
            config: self.config,
            index,
            qkv: self.qkv,
            q_norm: HeadNorm::new(self.config, index, affine.q_gain, affine.q_bias),
            k_norm: HeadNorm::new(self.config, index, affine.k_gain, affine.k_bias),
            image,
        }
    }
}

impl<R: Real> Head<'_, R> {
    /// Writes this head's columns of `out[rows, heads·head_dim]` and `lse[rows, heads]`, whose
    /// rows are the tokens `rows`.
    pub fn forward(&self, rows: Range<usize>, out: &mut [R], lse: &mut [R]) {
        let (dim, heads, keys) = (self.config.head_dim, self.config.heads, self.image.len());
        let (block, stride) = (BLOCK_ROWS.min(rows.len()), padded(keys));
        with_scratch([block * dim, keys * dim, block * stride], |[q, k, scores]| {
            self.k_norm.forward(k, self.columns(1, &self.image), self.stride(), dim);
            let k = Mat::new(k, keys, dim, dim);
            let v = Mat::new(self.columns(2, &self.image), keys, dim, self.stride());
            for (out, (lse, start)) in out
                .chunks_mut(BLOCK_ROWS * heads * dim)
                .zip(lse.chunks_mut(BLOCK_ROWS * heads).zip(rows.clone().step_by(BLOCK_ROWS)))
            {
                let block = start..rows.end.min(start + BLOCK_ROWS);
                let n = block.len();
                let (q, scores) = (&mut q[..n * dim], &mut scores[..n * stride]);
                self.q_norm.forward(q, self.columns(0, &block), self.stride(), dim);
                let scale = R::of(self.config.scale);
                gemm(
                    MatMut::new(scores, n, keys, stride),
                    false,
                    scale,
                    Mat::new(q, n, dim, dim),
                    k.t(),
                    false,
                );
                // The sum is divided out of the result, which is narrower than the scores.
                let sums = &mut q[..n];
                vectorised(
                    #[inline(always)]
                    || {
                        let statistics = sums.iter_mut().zip(lse[self.index..].iter_mut().step_by(heads));
                        for (row, (sum, lse)) in scores.chunks_exact_mut(stride).zip(statistics) {
                            let max;
                            (max, *sum) = exp_row(row, keys);
                            *lse = max + sum.ln();
                        }
                    },
                );
                let out = &mut out[self.index * dim..];
                let result = MatMut::new(out, n, dim, heads * dim);
                gemm(result, false, R::ONE, Mat::new(scores, n, keys, stride), v, false);
                for (out, &sum) in out.chunks_mut(heads * dim).zip(sums.iter()) {
                    let factor = R::ONE / sum;
                    for x in &mut out[..dim] {
                        *x *= factor;
                    }
                }
            }
        });
    }

    /// Writes the gradients of the tokens `rows` as queries: `dq` of these rows, and what they
    /// give to `dk` and `dv` of the whole image.
    pub fn backward(&self, rows: Range<usize>, results: &Results<'_, R>, grad: HeadGrad<'_, R>) {
        let (dim, heads, keys) = (self.config.head_dim, self.config.heads, self.image.len());
        let width = heads * dim;
        let HeadGrad { dq, dk, dv } = grad;
        let (block, stride) = (BLOCK_ROWS.min(rows.len()), padded(keys));
        let lengths = [block * dim, keys * dim, block * stride, block * stride, block];
        with_scratch(lengths, |[q, k, scores, dscores, delta]| {
            self.k_norm.forward(k, self.columns(1, &self.image), self.stride(), dim);
            let k = Mat::new(k, keys, dim, dim);
            let v = Mat::new(self.columns(2, &self.image), keys, dim, self.stride());
            for (dq, start) in dq.chunks_mut(BLOCK_ROWS * dim).zip(rows.clone().step_by(BLOCK_ROWS)) {
                let block = start..rows.end.min(start + BLOCK_ROWS);
                let n = block.len();
                let first = start == rows.start;
                let dout = &results.dout[start * width + self.index * dim..];
                let out = &results.out[start * width + self.index * dim..];
                let lse = &results.lse[start * heads + self.index..];
                let (q, delta) = (&mut q[..n * dim], &mut delta[..n]);
                let (scores, dscores) = (&mut scores[..n * stride], &mut dscores[..n * stride]);
                let scale = R::of(self.config.scale);

                self.q_norm.forward(q, self.columns(0, &block), self.stride(), dim);
                let q = Mat::new(q, n, dim, dim);
                gemm(MatMut::new(scores, n, keys, stride), false, scale, q, k.t(), false);
                let dout_block = Mat::new(dout, n, dim, width);
                gemm(MatMut::new(dscores, n, keys, stride), false, R::ONE, dout_block, v.t(), false);
                vectorised(
                    #[inline(always)]
                    || {
                        let rows = dout.chunks(width).zip(out.chunks(width));
                        for (delta, (dout, out)) in delta.iter_mut().zip(rows) {
                            *delta = sum2_by(&dout[..dim], &out[..dim], |a, b| a * b);
                        }
                        let rows = scores.chunks_exact_mut(stride).zip(dscores.chunks_exact_mut(stride));
                        let statistics = lse.iter().step_by(heads).zip(delta.iter());
                        for ((p, ds), (&lse, &delta)) in rows.zip(statistics) {
                            exp_grad_row(p, ds, lse, delta);
                        }
                    },
                );
                let (p, ds) = (Mat::new(scores, n, keys, stride), Mat::new(dscores, n, keys, stride));
                gemm(MatMut::new(dv, keys, dim, dim), !first, R::ONE, p.t(), dout_block, false);
                gemm(MatMut::new(dq, n, dim, dim), false, scale, ds, k, false);
                gemm(MatMut::new(dk, keys, dim, dim), !first, scale, ds.t(), q, false);
            }
        });
    }

    /// Writes this head's columns of dqkv from the gradients of the normalised rows, which are
    /// overwritten, and adds those of the gain and bias.
    pub fn store_grad(&self, task: &mut RowGrad<'_, R>, grad: HeadGrad<'_, R>) {
        let (dim, stride) = (self.config.head_dim, self.stride());
        let (q, k) = (self.columns(0, &task.rows), self.columns(1, &task.rows));
        let mut affine = of_head(task.affine, self.index, dim);
        let rows = task.dqkv.chunks_exact_mut(stride).zip(q.chunks(stride).zip(k.chunks(stride)));
        let HeadGrad { dq, dk, dv } = grad;
        let grads = dq.chunks_exact_mut(dim).zip(dk.chunks_exact_mut(dim).zip(dv.chunks_exact(dim)));
        vectorised(
            #[inline(always)]
            || {
                for ((dqkv, (q, k)), (dq, (dk, dv))) in rows.zip(grads) {
                    let (q_grad, k_grad) = match &mut affine {
                        Some([q, k]) => (Some(q), Some(k)),
                        None => (None, None),
                    };
                    self.q_norm.backward_row(dq, &q[..dim], q_grad);
                    self.k_norm.backward_row(dk, &k[..dim], k_grad);
                    for (i, row) in [&*dq, &*dk, dv].into_iter().enumerate() {
                        dqkv[self.column(i)..][..dim].copy_from_slice(row);
                    }
                }
            },
        );
    }

    /// Distance between rows of qkv.
    fn stride(&self) -> usize {
        3 * self.config.heads * self.config.head_dim
    }

    /// First column of this head's q (0), k (1) or v (2).
    fn column(&self, part: usize) -> usize {
        (part * self.config.heads + self.index) * self.config.head_dim
    }

    /// This head's q (0), k (1) or v (2) of some tokens: rows [`Self::stride`] apart, the first at 0.
    fn columns(&self, part: usize, tokens: &Range<usize>) -> &[R] {
        &self.qkv[tokens.start * self.stride() + self.column(part)..tokens.end * self.stride()]
    }
}
