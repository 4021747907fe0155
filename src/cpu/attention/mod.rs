//! Packed block-diagonal attention with QK-norm, rotary positions and grouped kv heads.
//!
//! Row `t` of `qkv` is `[q | k | v]`: q is `[heads, head_dim]`, k and v are `[kv_heads, head_dim]`, and
//! `heads / kv_heads` query heads in a row share a kv head. A token attends to the tokens of
//! its own image, `cu_seqlens[i]..cu_seqlens[i+1]`; no T×T matrix is built: a task owns up to 512
//! query rows of an image and walks its heads in blocks of rows, so scratch is at most block × S.
//! With QK-norm, `q̂ = norm(q) ⊙ γq (+ βq)`, likewise k; scores are `scale · q̂ k̂ᵀ`. With
//! rotary positions the normalised q and k of a token are turned by its angles before they meet.

mod head;
pub(crate) mod qk_norm;
mod rope;

use std::cmp::Reverse;
use std::ops::Range;

use rayon::prelude::*;

use super::real::Real;
use super::scratch::with_scratch;
use super::simd::add_assign;
pub use crate::ops::AttentionConfig;
use crate::ops::Rope;
use head::{HeadGrad, Heads, Results, RowGrad};
use qk_norm::AffinePartial;
use rope::Rotation;

/// Query rows of one task. Longer images are several tasks.
const TASK_ROWS: usize = 512;
/// Most tasks that one head of an image becomes in the backward pass, where each holds its own
/// part of dk and dv.
const MAX_PARTS: usize = 4;

/// Gains and biases of QK-norm, `[heads, head_dim]` (of k: `[kv_heads, head_dim]`) or `[head_dim]`; absent gain is
/// 1, absent bias 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct QkAffine<'a, R> {
    /// γq.
    pub q_gain: Option<&'a [R]>,
    /// γk.
    pub k_gain: Option<&'a [R]>,
    /// βq.
    pub q_bias: Option<&'a [R]>,
    /// βk.
    pub k_bias: Option<&'a [R]>,
}

/// Gradients of [`QkAffine`], added to.
#[derive(Debug, Default)]
pub struct QkAffineGrad<'a, R> {
    /// dγq.
    pub q_gain: Option<&'a mut [R]>,
    /// dγk.
    pub k_gain: Option<&'a mut [R]>,
    /// dβq.
    pub q_bias: Option<&'a mut [R]>,
    /// dβk.
    pub k_bias: Option<&'a mut [R]>,
}

/// `out[T, heads·head_dim]` and `lse[T, heads]` (log-sum-exp of the scaled scores) from
/// `qkv[T, (heads + 2·kv_heads)·head_dim]`. `rope` is `[T, head_dim / 2, 2]`, cos and sin of each token's
/// angle of each pair of columns, the same for all heads; it is there just if the config has a rotation.
/// `cu_seqlens` holds the used images only, `images + 1` entries.
///
/// # Panics
/// If the config has a rotation and `rope` is missing, or the other way round.
pub fn forward<R: Real>(
    config: &AttentionConfig,
    out: &mut [R],
    lse: &mut [R],
    qkv: &[R],
    affine: QkAffine<'_, R>,
    rope: Option<&[R]>,
    cu_seqlens: &[i32],
) {
    let heads = Heads { config, qkv, affine, rotation: rotation(config, rope) };
    let (mut out, mut lse) = (out, lse);
    let mut tasks = Vec::new();
    for image in images(cu_seqlens) {
        for rows in parts(&image, TASK_ROWS) {
            let out_rows = take_front(&mut out, rows.len() * config.heads * config.head_dim);
            let lse_rows = take_front(&mut lse, rows.len() * config.heads);
            tasks.push((image.clone(), rows, out_rows, lse_rows));
        }
    }
    tasks.sort_by_key(|(image, rows, ..)| Reverse(image.len() * rows.len()));
    tasks.into_iter().par_bridge().for_each(|(image, rows, out, lse)| {
        for index in 0..config.heads {
            heads.get(index, image.clone()).forward(rows.clone(), out, lse);
        }
    });
}

/// The probabilities of query head `head` of one image, whose tokens are `image`: for each of the tokens `queries` among
/// them, in order, `take` gets those over all of the image's keys, which add up to 1, and the largest score. The other
/// operands are those of [`forward`].
///
/// # Panics
/// As [`forward`].
#[allow(clippy::too_many_arguments)]
pub fn probabilities<R: Real>(
    config: &AttentionConfig,
    qkv: &[R],
    affine: QkAffine<'_, R>,
    rope: Option<&[R]>,
    image: Range<usize>,
    head: usize,
    queries: Range<usize>,
    take: impl FnMut(&[R], R),
) {
    if queries.is_empty() {
        return;
    }
    let heads = Heads { config, qkv, affine, rotation: rotation(config, rope) };
    heads.get(head, image).probabilities(queries, take);
}

/// `dqkv` (written) and the gradients of the gains (added) from `dout`. Probabilities are made
/// again from the scores and `lse`.
///
/// # Panics
/// As [`forward`].
#[allow(clippy::too_many_arguments)]
pub fn backward<R: Real>(
    config: &AttentionConfig,
    dqkv: &mut [R],
    daffine: QkAffineGrad<'_, R>,
    dout: &[R],
    out: &[R],
    lse: &[R],
    qkv: &[R],
    affine: QkAffine<'_, R>,
    rope: Option<&[R]>,
    cu_seqlens: &[i32],
) {
    let heads = Heads { config, qkv, affine, rotation: rotation(config, rope) };
    let results = Results { dout, out, lse };
    let task_count = images(cu_seqlens).map(|image| parts(&image, TASK_ROWS).count()).sum();
    let mut partial = AffinePartial::new(config, task_count, &daffine);
    let mut partials = partial.parts();
    let mut dqkv = dqkv;
    let mut short = Vec::new();
    for image in images(cu_seqlens) {
        let tasks: Vec<_> = parts(&image, TASK_ROWS)
            .map(|rows| RowGrad {
                dqkv: take_front(&mut dqkv, rows.len() * config.qkv_width()),
                affine: partials.next().unwrap_or_default(),
                rows,
            })
            .collect();
        if tasks.len() == 1 {
            short.extend(tasks);
        } else {
            backward_long(&heads, &results, &image, tasks);
        }
    }
    short.sort_by_key(|task| Reverse(task.rows.len()));
    short.into_iter().par_bridge().for_each(|mut task| {
        let len = task.rows.len() * config.head_dim;
        with_scratch([len; 3], |[dq, dk, dv]| {
            for index in 0..config.heads {
                let head = heads.get(index, task.rows.clone());
                let (first, last) = head.place_in_group();
                head.backward(task.rows.clone(), &results, HeadGrad { dq, dk, dv, add: !first });
                head.store_query(&mut task, dq);
                if last {
                    head.store_key_value(&mut task, dk, dv);
                }
            }
        });
    });
    drop(partials);
    partial.add_to(config, daffine);
}

/// Backward of one image that is several tasks: first the heads and parts of the query rows, each
/// with its own dk and dv, then rows of dqkv, which sum the parts in order.
fn backward_long<R: Real>(
    heads: &Heads<'_, R>,
    results: &Results<'_, R>,
    image: &Range<usize>,
    tasks: Vec<RowGrad<'_, R>>,
) {
    let dim = heads.config.head_dim;
    let part_rows = image.len().div_ceil(MAX_PARTS).next_multiple_of(TASK_ROWS);
    let count = parts(image, part_rows).count();
    let work: Vec<_> = (0..heads.config.heads)
        .flat_map(|index| parts(image, part_rows).map(move |rows| (index, rows)))
        .collect();
    let grads: Vec<[Vec<R>; 3]> = work
        .into_par_iter()
        .with_max_len(1)
        .map(|(index, rows)| {
            let mut grads = [rows.len(), image.len(), image.len()].map(|n| vec![R::ZERO; n * dim]);
            let [dq, dk, dv] = &mut grads;
            heads.get(index, image.clone()).backward(rows, results, HeadGrad { dq, dk, dv, add: false });
            grads
        })
        .collect();
    tasks.into_par_iter().with_max_len(1).for_each(|mut task| {
        let first = task.rows.start - image.start;
        let (start, len) = (first * dim, task.rows.len() * dim);
        with_scratch([len; 3], |[dq, dk, dv]| {
            for (index, grads) in grads.chunks_exact(count).enumerate() {
                dq.copy_from_slice(&grads[first / part_rows][0][first % part_rows * dim..][..len]);
                let head = heads.get(index, image.clone());
                let (first, last) = head.place_in_group();
                head.store_query(&mut task, dq);
                for (part, grads) in grads.iter().enumerate() {
                    let (dk_part, dv_part) = (&grads[1][start..][..len], &grads[2][start..][..len]);
                    if first && part == 0 {
                        dk.copy_from_slice(dk_part);
                        dv.copy_from_slice(dv_part);
                    } else {
                        add_assign(dk, dk_part);
                        add_assign(dv, dv_part);
                    }
                }
                if last {
                    head.store_key_value(&mut task, dk, dv);
                }
            }
        });
    });
}

fn rotation<'a, R>(config: &AttentionConfig, table: Option<&'a [R]>) -> Option<Rotation<'a, R>> {
    let AttentionConfig { rope, head_dim, .. } = *config;
    assert_eq!(
        table.is_some(),
        rope != Rope::None,
        "attention with a {rope:?} rotation and its table go together"
    );
    table.map(|table| Rotation { rope, table, head_dim })
}

/// Token ranges of the images that have tokens.
fn images(cu_seqlens: &[i32]) -> impl Iterator<Item = Range<usize>> {
    cu_seqlens.windows(2).map(|pair| pair[0] as usize..pair[1] as usize).filter(|image| !image.is_empty())
}

/// `range` in pieces of at most `rows`.
fn parts(range: &Range<usize>, rows: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = range.end;
    range.clone().step_by(rows).map(move |start| start..end.min(start + rows))
}

/// Splits the first `len` elements off.
pub(crate) fn take_front<'a, R>(slice: &mut &'a mut [R], len: usize) -> &'a mut [R] {
    let (front, rest) = std::mem::take(slice).split_at_mut(len);
    *slice = rest;
    front
}
