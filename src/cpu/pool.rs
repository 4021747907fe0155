//! From the tokens of an image to one vector: masked attention pooling, mean pooling, gather.
//!
//! Images are the unit of parallel work; sums over images run in their order.

use std::ops::Range;
use std::slice::ChunksExact;

use rayon::prelude::*;

use super::attention::qk_norm::{AffinePartial, HeadNorm, of_head};
use super::attention::{AttentionConfig, QkAffine, QkAffineGrad, take_front};
use super::real::Real;
use super::scratch::with_scratch;
use super::simd::{add_assign, add_scaled, sum2_by, task_len, vectorised};
use super::softmax::{exp_row, padded, softmax_row};

/// Masked attention pooling: `out[N, heads·head_dim]` and `lse[N, heads]` from one query
/// `q[heads·head_dim]` shared by all images and `kv[T, 2·heads·head_dim]`, rows `[k | v]`.
/// The first `skip` tokens of every image (prefix tokens) are left out; an image without
/// remaining tokens gives zeros.
#[allow(clippy::too_many_arguments)]
pub fn attention_forward<R: Real>(
    config: &AttentionConfig,
    out: &mut [R],
    lse: &mut [R],
    q: &[R],
    kv: &[R],
    affine: QkAffine<'_, R>,
    cu_seqlens: &[i32],
    skip: usize,
) {
    let (dim, width) = (config.head_dim, config.heads * config.head_dim);
    let query = normalised_query(config, q, affine);
    let scale = R::of(config.scale);
    let images: Vec<_> = pooled(cu_seqlens, skip).collect();
    let results = out.par_chunks_exact_mut(width).zip(lse.par_chunks_exact_mut(config.heads));
    results.zip(images).for_each(|((out, lse), image)| {
        out.fill(R::ZERO);
        lse.fill(R::ZERO);
        if image.is_empty() {
            return;
        }
        let rows = &kv[image.start * 2 * width..image.end * 2 * width];
        with_scratch([padded(image.len()), dim], |[scores, k_hat]| {
            for (index, lse) in lse.iter_mut().enumerate() {
                let norm = HeadNorm::new(config, index, affine.k_gain, affine.k_bias);
                let columns = index * dim..(index + 1) * dim;
                let (query, out) = (&query[columns.clone()], &mut out[columns.clone()]);
                vectorised(
                    #[inline(always)]
                    || {
                        let keys = rows.chunks_exact(2 * width);
                        score_rows(scores, &norm, query, keys, columns.clone(), scale, k_hat);
                        let (max, sum) = exp_row(scores, image.len());
                        *lse = max + sum.ln();
                        let factor = R::ONE / sum;
                        for (&p, row) in scores.iter().zip(rows.chunks_exact(2 * width)) {
                            add_scaled(out, p * factor, &row[width + columns.start..][..dim]);
                        }
                    },
                );
            }
        });
    });
}

/// The probabilities of the pooled tokens `image` of one image: `take` gets those of each head in turn, which add up to 1,
/// and its largest score. The other operands are those of [`attention_forward`].
pub fn probabilities<R: Real>(
    config: &AttentionConfig,
    q: &[R],
    kv: &[R],
    affine: QkAffine<'_, R>,
    image: Range<usize>,
    mut take: impl FnMut(&[R], R),
) {
    let (dim, width) = (config.head_dim, config.heads * config.head_dim);
    let query = normalised_query(config, q, affine);
    let rows = &kv[image.start * 2 * width..image.end * 2 * width];
    with_scratch([padded(image.len()), dim], |[scores, k_hat]| {
        for index in 0..config.heads {
            let norm = HeadNorm::new(config, index, affine.k_gain, affine.k_bias);
            let columns = index * dim..(index + 1) * dim;
            let query = &query[columns.clone()];
            let keys = rows.chunks_exact(2 * width);
            score_rows(scores, &norm, query, keys, columns, R::of(config.scale), k_hat);
            let max = softmax_row(scores, image.len());
            take(&scores[..image.len()], max);
        }
    });
}

/// Scaled scores of one head's `query` with the keys in `columns` of rows `[k | v]`; `k_hat` holds a normalised key.
#[inline(always)]
fn score_rows<R: Real>(
    scores: &mut [R],
    norm: &HeadNorm<'_, R>,
    query: &[R],
    rows: ChunksExact<'_, R>,
    columns: Range<usize>,
    scale: R,
    k_hat: &mut [R],
) {
    for (score, row) in scores.iter_mut().zip(rows) {
        norm.forward_row(k_hat, &row[columns.clone()]);
        *score = scale * sum2_by(query, k_hat, |q, k| q * k);
    }
}

/// `dq` and `dkv` (written, `dq` summed over the images) and the gradients of the gains (added).
#[allow(clippy::too_many_arguments)]
pub fn attention_backward<R: Real>(
    config: &AttentionConfig,
    dq: &mut [R],
    dkv: &mut [R],
    daffine: QkAffineGrad<'_, R>,
    dout: &[R],
    out: &[R],
    lse: &[R],
    q: &[R],
    kv: &[R],
    affine: QkAffine<'_, R>,
    cu_seqlens: &[i32],
    skip: usize,
) {
    let (dim, width) = (config.head_dim, config.heads * config.head_dim);
    let query = normalised_query(config, q, affine);
    let scale = R::of(config.scale);
    let images = cu_seqlens.len().saturating_sub(1);
    // The last part is that of the query's norm, which acts once for all images.
    let mut partial = AffinePartial::new(config, images + 1, &daffine);
    let mut partials = partial.parts();
    let mut dquery = vec![R::ZERO; images * width];

    let mut dkv_rest = dkv;
    let tasks: Vec<_> = cu_seqlens
        .windows(2)
        .zip(pooled(cu_seqlens, skip))
        .zip(dquery.chunks_exact_mut(width))
        .enumerate()
        .map(|(at, ((pair, image), dquery))| {
            let prefix = take_front(&mut dkv_rest, (image.start - pair[0] as usize) * 2 * width);
            prefix.fill(R::ZERO);
            let dkv = take_front(&mut dkv_rest, image.len() * 2 * width);
            (at, image, dkv, dquery, partials.next().unwrap_or_default())
        })
        .collect();
    tasks.into_par_iter().for_each(|(at, image, dkv, dquery, part)| {
        let rows = &kv[image.start * 2 * width..image.end * 2 * width];
        with_scratch([dim, dim], |[k_hat, dk]| {
            for index in 0..config.heads {
                let norm = HeadNorm::new(config, index, affine.k_gain, affine.k_bias);
                let mut grads = of_head(part, index, dim);
                let columns = index * dim..(index + 1) * dim;
                let (query, dquery) = (&query[columns.clone()], &mut dquery[columns.clone()]);
                let dout = &dout[at * width..][columns.clone()];
                let lse = lse[at * config.heads + index];
                vectorised(
                    #[inline(always)]
                    || {
                        let delta = sum2_by(dout, &out[at * width..][columns.clone()], |a, b| a * b);
                        let rows = rows.chunks_exact(2 * width).zip(dkv.chunks_exact_mut(2 * width));
                        for (row, drow) in rows {
                            let (k, v) = (&row[columns.clone()], &row[width + columns.start..][..dim]);
                            norm.forward_row(k_hat, k);
                            let p = (scale * sum2_by(query, k_hat, |q, k| q * k) - lse).exp();
                            let ds = scale * p * (sum2_by(dout, v, |a, b| a * b) - delta);
                            add_scaled(dquery, ds, k_hat);
                            for (dk, &q) in dk.iter_mut().zip(query) {
                                *dk = ds * q;
                            }
                            norm.backward_row(dk, k, grads.as_mut().map(|[_, k]| k));
                            drow[columns.clone()].copy_from_slice(dk);
                            for (dv, &dout) in drow[width + columns.start..][..dim].iter_mut().zip(dout) {
                                *dv = p * dout;
                            }
                        }
                    },
                );
            }
        });
    });

    dq.fill(R::ZERO);
    for image in dquery.chunks_exact(width) {
        add_assign(dq, image);
    }
    let part = partials.next().unwrap_or_default();
    for (index, (dq, q)) in dq.chunks_exact_mut(dim).zip(q.chunks_exact(dim)).enumerate() {
        let norm = HeadNorm::new(config, index, affine.q_gain, affine.q_bias);
        let mut grads = of_head(part, index, dim);
        norm.backward_row(dq, q, grads.as_mut().map(|[q, _]| q));
    }
    drop(partials);
    partial.add_to(config, daffine);
}

/// Mean over the tokens of each image after the first `skip`: `out[N, D]` from `x[T, D]`; zeros
/// where none remain.
pub fn mean_forward<R: Real>(out: &mut [R], x: &[R], cu_seqlens: &[i32], skip: usize, width: usize) {
    let images: Vec<_> = pooled(cu_seqlens, skip).collect();
    out.par_chunks_exact_mut(width).zip(images).for_each(|(out, image)| {
        out.fill(R::ZERO);
        let factor = R::ONE / R::of(image.len().max(1) as f64);
        for row in x[image.start * width..image.end * width].chunks_exact(width) {
            add_assign(out, row);
        }
        for out in out {
            *out *= factor;
        }
    });
}

/// `dx[T, D]` (written) from `dout[N, D]`.
pub fn mean_backward<R: Real>(dx: &mut [R], dout: &[R], cu_seqlens: &[i32], skip: usize, width: usize) {
    let mut rest = dx;
    let tasks: Vec<_> = cu_seqlens
        .windows(2)
        .zip(pooled(cu_seqlens, skip))
        .zip(dout.chunks_exact(width))
        .map(|((pair, image), dout)| {
            let prefix = take_front(&mut rest, (image.start - pair[0] as usize) * width);
            (prefix, take_front(&mut rest, image.len() * width), dout)
        })
        .collect();
    tasks.into_par_iter().for_each(|(prefix, dx, dout)| {
        prefix.fill(R::ZERO);
        let factor = R::ONE / R::of((dx.len() / width).max(1) as f64);
        for row in dx.chunks_exact_mut(width) {
            for (dx, &dout) in row.iter_mut().zip(dout) {
                *dx = dout * factor;
            }
        }
    });
}

/// `out[i] = x[rows[i]]`: token gather, rows of `width`.
pub fn gather<R: Real>(out: &mut [R], x: &[R], rows: &[u32], width: usize) {
    for (out, &row) in out.chunks_exact_mut(width).zip(rows) {
        out.copy_from_slice(&x[row as usize * width..][..width]);
    }
}

/// `dx` (written, zero where nothing is gathered) with `dx[rows[i]] += dout[i]`, in order of `i`.
pub fn gather_grad<R: Real>(dx: &mut [R], dout: &[R], rows: &[u32], width: usize) {
    dx.par_chunks_mut(task_len(width)).for_each(|dx| dx.fill(R::ZERO));
    for (dout, &row) in dout.chunks_exact(width).zip(rows) {
        add_assign(&mut dx[row as usize * width..][..width], dout);
    }
}

/// The tokens of each image that are pooled; an empty range at the image's end where none remain.
fn pooled(cu_seqlens: &[i32], skip: usize) -> impl Iterator<Item = Range<usize>> {
    cu_seqlens.windows(2).map(move |pair| {
        let (start, end) = (pair[0] as usize, pair[1] as usize);
        end.min(start + skip)..end
    })
}

/// The query after its norm, all heads.
fn normalised_query<R: Real>(config: &AttentionConfig, q: &[R], affine: QkAffine<'_, R>) -> Vec<R> {
    let dim = config.head_dim;
    let mut query = vec![R::ZERO; q.len()];
    for (index, (query, q)) in query.chunks_exact_mut(dim).zip(q.chunks_exact(dim)).enumerate() {
        HeadNorm::new(config, index, affine.q_gain, affine.q_bias).forward(query, q, dim, dim);
    }
    query
}
