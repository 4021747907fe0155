//! One query head of one image: blocks of query rows against all keys of its kv head.

use std::ops::Range;

use super::qk_norm::{HeadNorm, HeadNormGrad, of_head};
use super::rope::Rotation;
use super::{AttentionConfig, QkAffine};
use crate::cpu::gemm::{Mat, MatMut, gemm};
use crate::cpu::real::Real;
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{sum2_by, vectorised};
use crate::cpu::softmax::{exp_grad_row, exp_row, padded, softmax_row};

/// Query rows whose scores are held at a time.
const BLOCK_ROWS: usize = 128;

/// The operands of all heads of a batch.
#[derive(Debug)]
pub(super) struct Heads<'a, R> {
    pub config: &'a AttentionConfig,
    pub qkv: &'a [R],
    pub affine: QkAffine<'a, R>,
    pub rotation: Option<Rotation<'a, R>>,
}

/// What the backward pass knows of the forward pass's results, each `[T, …]` as there.
#[derive(Debug)]
pub(super) struct Results<'a, R> {
    pub dout: &'a [R],
    pub out: &'a [R],
    pub lse: &'a [R],
}

/// Gradients of one query head, dense rows of `head_dim`: of q as it meets k, written, and of k as it meets q and
/// of v, written or added to.
#[derive(Debug)]
pub(super) struct HeadGrad<'a, R> {
    pub dq: &'a mut [R],
    pub dk: &'a mut [R],
    pub dv: &'a mut [R],
    /// Whether dk and dv are added to.
    pub add: bool,
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
    kv_index: usize,
    qkv: &'a [R],
    rotation: Option<Rotation<'a, R>>,
    q_norm: HeadNorm<'a, R>,
    k_norm: HeadNorm<'a, R>,
    image: Range<usize>,
}

impl<'a, R: Real> Heads<'a, R> {
    /// Query head `index` of the image with tokens `image`.
    pub fn get(&self, index: usize, image: Range<usize>) -> Head<'a, R> {
        let affine = self.affine;
        let kv_index = index / self.config.group();
        Head {
            config: self.config,
            index,
            kv_index,
            qkv: self.qkv,
            rotation: self.rotation,
            q_norm: HeadNorm::new(self.config, index, affine.q_gain, affine.q_bias),
            k_norm: HeadNorm::new(self.config, kv_index, affine.k_gain, affine.k_bias),
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
            self.keys(k);
            let k = Mat::new(k, keys, dim, dim);
            let v = Mat::new(self.columns(2, &self.image), keys, dim, self.stride());
            for (out, (lse, start)) in out
                .chunks_mut(BLOCK_ROWS * heads * dim)
                .zip(lse.chunks_mut(BLOCK_ROWS * heads).zip(rows.clone().step_by(BLOCK_ROWS)))
            {
                let block = start..rows.end.min(start + BLOCK_ROWS);
                let n = block.len();
                let (q, scores) = (&mut q[..n * dim], &mut scores[..n * stride]);
                self.scores(scores, q, k, &block);
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

    /// Hands over, for each of the tokens `rows` in order, its probabilities over the keys of the image and its largest
    /// score.
    pub fn probabilities(&self, rows: Range<usize>, mut take: impl FnMut(&[R], R)) {
        let (dim, keys) = (self.config.head_dim, self.image.len());
        let (block, stride) = (BLOCK_ROWS.min(rows.len()), padded(keys));
        with_scratch([block * dim, keys * dim, block * stride], |[q, k, scores]| {
            self.keys(k);
            let k = Mat::new(k, keys, dim, dim);
            for start in rows.clone().step_by(BLOCK_ROWS) {
                let block = start..rows.end.min(start + BLOCK_ROWS);
                let n = block.len();
                let (q, scores) = (&mut q[..n * dim], &mut scores[..n * stride]);
                self.scores(scores, q, k, &block);
                for row in scores.chunks_exact_mut(stride) {
                    let max = softmax_row(row, keys);
                    take(&row[..keys], max);
                }
            }
        });
    }

    /// The gradients of the tokens `rows` as queries: `dq` of these rows, and what they
    /// give to `dk` and `dv` of the whole image.
    pub fn backward(&self, rows: Range<usize>, results: &Results<'_, R>, grad: HeadGrad<'_, R>) {
        let (dim, heads, keys) = (self.config.head_dim, self.config.heads, self.image.len());
        let width = heads * dim;
        let HeadGrad { dq, dk, dv, add } = grad;
        let (block, stride) = (BLOCK_ROWS.min(rows.len()), padded(keys));
        let lengths = [block * dim, keys * dim, block * stride, block * stride, block];
        with_scratch(lengths, |[q, k, scores, dscores, delta]| {
            self.keys(k);
            let k = Mat::new(k, keys, dim, dim);
            let v = Mat::new(self.columns(2, &self.image), keys, dim, self.stride());
            for (dq, start) in dq.chunks_mut(BLOCK_ROWS * dim).zip(rows.clone().step_by(BLOCK_ROWS)) {
                let block = start..rows.end.min(start + BLOCK_ROWS);
                let n = block.len();
                let add = add || start != rows.start;
                let dout = &results.dout[start * width + self.index * dim..];
                let out = &results.out[start * width + self.index * dim..];
                let lse = &results.lse[start * heads + self.index..];
                let (q, delta) = (&mut q[..n * dim], &mut delta[..n]);
                let (scores, dscores) = (&mut scores[..n * stride], &mut dscores[..n * stride]);
                let scale = R::of(self.config.scale);

                self.scores(scores, q, k, &block);
                let q = Mat::new(q, n, dim, dim);
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
                gemm(MatMut::new(dv, keys, dim, dim), add, R::ONE, p.t(), dout_block, false);
                gemm(MatMut::new(dq, n, dim, dim), false, scale, ds, k, false);
                gemm(MatMut::new(dk, keys, dim, dim), add, scale, ds.t(), q, false);
            }
        });
    }

    /// Writes this head's columns of dq from the gradients of the rows that met k, which are overwritten, and adds
    /// those of the gain and bias.
    pub fn store_query(&self, task: &mut RowGrad<'_, R>, dq: &mut [R]) {
        let grad = of_head(task.affine, self.index, self.config.head_dim).map(|[q, _]| q);
        self.store_normalised(0, &self.q_norm, &task.rows, task.dqkv, grad, dq);
    }

    /// Likewise of dk and dv of this head's kv head, once for all query heads that share it.
    pub fn store_key_value(&self, task: &mut RowGrad<'_, R>, dk: &mut [R], dv: &[R]) {
        let dim = self.config.head_dim;
        let grad = of_head(task.affine, self.kv_index, dim).map(|[_, k]| k);
        self.store_normalised(1, &self.k_norm, &task.rows, task.dqkv, grad, dk);
        let rows = task.dqkv.chunks_exact_mut(self.stride());
        for (dqkv, dv) in rows.zip(dv.chunks_exact(dim)) {
            dqkv[self.column(2)..][..dim].copy_from_slice(dv);
        }
    }

    fn store_normalised(
        &self,
        part: usize,
        norm: &HeadNorm<'_, R>,
        tokens: &Range<usize>,
        dqkv: &mut [R],
        mut grad: Option<HeadNormGrad<'_, R>>,
        dy: &mut [R],
    ) {
        if let Some(rotation) = &self.rotation {
            rotation.backward(dy, tokens);
        }
        let (dim, stride, column) = (self.config.head_dim, self.stride(), self.column(part));
        let x = self.columns(part, tokens);
        vectorised(
            #[inline(always)]
            || {
                let rows = dqkv.chunks_exact_mut(stride).zip(x.chunks(stride));
                for ((dqkv, x), dy) in rows.zip(dy.chunks_exact_mut(dim)) {
                    norm.backward_row(dy, &x[..dim], grad.as_mut());
                    dqkv[column..][..dim].copy_from_slice(dy);
                }
            },
        );
    }

    /// Whether this is the first and the last query head of its kv head.
    pub fn place_in_group(&self) -> (bool, bool) {
        let group = self.config.group();
        (self.index.is_multiple_of(group), (self.index + 1).is_multiple_of(group))
    }

    /// The scaled scores of the queries of some tokens, which go to `q`, with the keys `k` of the image, in rows of
    /// [`padded`] length.
    fn scores(&self, scores: &mut [R], q: &mut [R], k: Mat<'_, R>, tokens: &Range<usize>) {
        let (dim, keys, n) = (self.config.head_dim, self.image.len(), tokens.len());
        self.queries(q, tokens);
        let (scores, q) = (MatMut::new(scores, n, keys, padded(keys)), Mat::new(q, n, dim, dim));
        gemm(scores, false, R::of(self.config.scale), q, k.t(), false);
    }

    /// The queries of some tokens as they meet the keys.
    fn queries(&self, q: &mut [R], tokens: &Range<usize>) {
        self.q_norm.forward(q, self.columns(0, tokens), self.stride(), self.config.head_dim);
        if let Some(rotation) = &self.rotation {
            rotation.forward(q, tokens);
        }
    }

    /// The keys of the whole image as they meet the queries.
    fn keys(&self, k: &mut [R]) {
        self.k_norm.forward(k, self.columns(1, &self.image), self.stride(), self.config.head_dim);
        if let Some(rotation) = &self.rotation {
            rotation.forward(k, &self.image);
        }
    }

    /// Distance between rows of qkv.
    fn stride(&self) -> usize {
        self.config.qkv_width()
    }

    /// First column of this head's q (0), or of its kv head's k (1) or v (2).
    fn column(&self, part: usize) -> usize {
        let AttentionConfig { heads, kv_heads, head_dim, .. } = *self.config;
        let head = match part {
            0 => self.index,
            1 => heads + self.kv_index,
            _ => heads + kv_heads + self.kv_index,
        };
        head * head_dim
    }

    /// This head's q (0), k (1) or v (2) of some tokens: rows [`Self::stride`] apart, the first at 0.
    fn columns(&self, part: usize, tokens: &Range<usize>) -> &[R] {
        &self.qkv[tokens.start * self.stride() + self.column(part)..tokens.end * self.stride()]
    }
}
