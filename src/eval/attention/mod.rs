//! Attention of a model as numbers: its entropy and largest scores by block, and what the image's vector attends to.
//!
//! It is computed on the host from what a forward pass has kept ([`Keep`](super::model::Keep)), whatever device ran it, by
//! the functions with which the CPU device attends.
//!
//! The entropy of a query with probabilities p over the n tokens of its image is H = −Σ p ln p: ln n where it attends to
//! all alike, 0 where to one alone. Without QK-norm the scores of large models grow until it falls to 0 ("attention
//! entropy collapse", Zhai et al. 2023, arXiv 2303.06296; ViT-22B, Dehghani et al. 2023, arXiv 2302.05442, section 2).

pub mod picture;
mod pooling;
pub mod probe;

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

pub use pooling::{PoolingMap, PoolingMaps, check_pooling};

use super::model::Observed;
use crate::autograd::attention::{AttentionOperands, QkParams};
use crate::cpu::attention::{QkAffine, probabilities};
use crate::data::batch::PackedBatch;
use crate::error::Result;

/// Attention of one block over a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockAttention {
    /// Mean entropy over heads, queries and images, in nats.
    pub entropy: f64,
    /// That of the head where it is lowest.
    pub min_head_entropy: f64,
    /// Largest scaled score of all queries and keys.
    pub max_logit: f64,
}

/// H = −Σ p ln p in nats of probabilities that add up to 1.
pub fn entropy(probabilities: &[f32]) -> f64 {
    let terms = probabilities.iter().map(|p| f64::from(*p)).filter(|p| *p != 0.0);
    -terms.map(|p| p * p.ln()).sum::<f64>()
}

/// The mean over the queries of `batch` of the entropy that uniform attention would have, ln n.
pub fn uniform_entropy(batch: &PackedBatch) -> f64 {
    let lengths = || used(batch).map(|slot| batch.range(slot).len() as f64);
    lengths().map(|n| n * n.ln()).sum::<f64>() / lengths().sum::<f64>()
}

/// Attention of every block of `model` in its last run, which was over `batch`: a model that keeps
/// [`Keep::Blocks`](super::model::Keep::Blocks). Slots without weight, whose image could not be read, do not count.
///
/// # Errors
/// A failed device.
pub fn blocks(model: &dyn Observed, batch: &PackedBatch) -> Result<Vec<BlockAttention>> {
    AttentionOperands::of(model.graph()).iter().map(|block| self::block(model, block, batch)).collect()
}

fn block(model: &dyn Observed, block: &AttentionOperands, batch: &PackedBatch) -> Result<BlockAttention> {
    let operands = Operands::read(model, *block)?;
    let heads = block.config.heads;
    let work: Vec<(usize, usize)> =
        used(batch).flat_map(|slot| (0..heads).map(move |head| (slot, head))).collect();
    // Sums of entropies and largest scores, by image and head.
    let found: Vec<(f64, f64)> = work
        .into_par_iter()
        .map(|(slot, head)| {
            let image = batch.range(slot);
            let (mut sum, mut max) = (0.0, f64::NEG_INFINITY);
            operands.probabilities(image.clone(), head, image, |row, score| {
                let entropy = entropy(row);
                sum += entropy;
                // The score of a row that is broken says nothing of it.
                max = largest(max, if entropy.is_nan() { f64::NAN } else { score.into() });
            });
            (sum, max)
        })
        .collect();
    let queries = used(batch).map(|slot| batch.range(slot).len()).sum::<usize>() as f64;
    let by_head: Vec<f64> = (0..heads)
        .map(|head| found.iter().skip(head).step_by(heads).map(|(sum, _)| sum).sum::<f64>() / queries)
        .collect();
    Ok(BlockAttention {
        entropy: by_head.iter().sum::<f64>() / heads as f64,
        min_head_entropy: by_head.iter().copied().fold(f64::INFINITY, least),
        max_logit: found.iter().map(|(_, max)| *max).fold(f64::NEG_INFINITY, largest),
    })
}

/// The smaller one; NaN where one is NaN, which `f64::min` would leave out.
fn least(a: f64, b: f64) -> f64 {
    if a.is_nan() || a < b { a } else { b }
}

/// The larger one; NaN where one is NaN.
fn largest(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Slots whose image counts.
fn used(batch: &PackedBatch) -> impl Iterator<Item = usize> {
    (0..batch.images).filter(|slot| batch.weights[*slot] > 0.0 && !batch.range(*slot).is_empty())
}

/// The values that an attention op reads.
pub struct Operands<'a> {
    op: AttentionOperands,
    qkv: Cow<'a, [f32]>,
    affine: Affine<'a>,
    rope: Option<Cow<'a, [f32]>>,
}

impl<'a> Operands<'a> {
    fn read(model: &'a dyn Observed, op: AttentionOperands) -> Result<Self> {
        Ok(Self {
            qkv: model.value(op.qkv)?,
            affine: Affine::read(model, &op.params)?,
            rope: op.rope.map(|rope| model.value(rope)).transpose()?,
            op,
        })
    }

    fn probabilities(
        &self,
        image: Range<usize>,
        head: usize,
        queries: Range<usize>,
        take: impl FnMut(&[f32], f32),
    ) {
        let (affine, rope) = (self.affine.borrowed(), self.rope.as_deref());
        probabilities(&self.op.config, &self.qkv, affine, rope, image, head, queries, take);
    }
}

/// Gains and biases of QK-norm: γq, γk, βq, βk.
pub struct Affine<'a>([Option<Cow<'a, [f32]>>; 4]);

impl<'a> Affine<'a> {
    fn read(model: &'a dyn Observed, params: &QkParams) -> Result<Self> {
        let read = |tensor: Option<_>| tensor.map(|tensor| model.value(tensor)).transpose();
        let QkParams { q_gain, k_gain, q_bias, k_bias } = *params;
        Ok(Self([read(q_gain)?, read(k_gain)?, read(q_bias)?, read(k_bias)?]))
    }

    fn borrowed(&self) -> QkAffine<'_, f32> {
        let [q_gain, k_gain, q_bias, k_bias] = self.0.each_ref().map(Option::as_deref);
        QkAffine { q_gain, k_gain, q_bias, k_bias }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropies_of_known_distributions() {
        for n in [1, 2, 7, 64] {
            let uniform = entropy(&vec![1.0 / n as f32; n]);
            assert!((uniform - (n as f64).ln()).abs() < 1e-6, "{n}: {uniform}");
        }
        assert_eq!(entropy(&[0.0, 1.0, 0.0]), 0.0);
        assert!((entropy(&[0.5, 0.25, 0.25]) - 1.5 * 2f64.ln()).abs() < 1e-12);
        assert!(entropy(&[f32::NAN, 0.5]).is_nan());
    }

    #[test]
    fn what_is_no_number_shows() {
        assert_eq!(
            (least(1.0, 2.0), least(2.0, 1.0), largest(1.0, 2.0), largest(2.0, 1.0)),
            (1.0, 1.0, 2.0, 2.0)
        );
        for (a, b) in [(f64::NAN, 1.0), (1.0, f64::NAN)] {
            assert!(least(a, b).is_nan() && largest(a, b).is_nan());
        }
    }
}
