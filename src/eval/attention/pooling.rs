//! What the vector of an image attends to: the query of attention pooling, or the class token in the last block.

use std::borrow::Cow;

use super::{Affine, Operands};
use crate::autograd::attention::AttentionOperands;
use crate::autograd::pool::PoolOperands;
use crate::cpu::pool;
use crate::data::batch::{PREFIX, PackedBatch};
use crate::error::{Error, Result};
use crate::eval::model::Observed;
use crate::recipe::{ModelConfig, PoolKind};

/// Attention of an image's vector to its patches.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolingMap {
    /// Patch rows.
    pub rows: usize,
    /// Patch columns.
    pub cols: usize,
    /// Of each head, the probability of each patch, `[rows, cols]`.
    pub heads: Vec<Vec<f32>>,
    /// Tokens that are attended to: the patches, and prefix tokens where those are among them.
    pub attended: usize,
    /// Share of the attention that prefix tokens get, mean over the heads; they have no place on the map.
    pub prefix: f64,
}

impl PoolingMap {
    /// The probability of a token that all get where all get the same.
    pub fn uniform(&self) -> f32 {
        1.0 / self.attended as f32
    }

    /// Mean over the heads, `[rows, cols]`.
    pub fn mean(&self) -> Vec<f32> {
        let count = self.heads.len() as f32;
        (0..self.rows * self.cols)
            .map(|i| self.heads.iter().map(|head| head[i]).sum::<f32>() / count)
            .collect()
    }
}

/// Whether images of the model have such a map.
///
/// # Errors
/// A model that pools by the mean, or has no block to attend in.
pub fn check_pooling(model: &ModelConfig) -> Result<()> {
    match model.pool {
        PoolKind::Mean => Err(Error::usage(
            "this model takes the mean of an image's tokens (model.pool = \"mean\"), in which all patches count alike: there \
             is no attention to draw",
        )),
        PoolKind::Cls if model.dimensions()?.depth == 0 => Err(Error::usage(
            "this model has no block (model.depth = 0) in which its class token attends to patches",
        )),
        _ => Ok(()),
    }
}

/// What the maps of a batch follow from.
pub enum PoolingMaps<'a> {
    /// Of attention pooling.
    Pool {
        /// The op.
        op: PoolOperands,
        /// `[heads·head_dim]`.
        q: Cow<'a, [f32]>,
        /// `[T, 2·heads·head_dim]`.
        kv: Cow<'a, [f32]>,
        /// Gains and biases.
        affine: Affine<'a>,
    },
    /// Of a class token in the last block.
    ClassToken(Operands<'a>),
}

impl<'a> PoolingMaps<'a> {
    /// Those of the batch over which `model` ran last: a model that keeps
    /// [`Keep::Pooling`](crate::eval::model::Keep::Pooling), and for which [`check_pooling`] holds.
    ///
    /// # Errors
    /// A failed device.
    pub fn read(model: &'a dyn Observed) -> Result<Self> {
        if let Some(op) = PoolOperands::of(model.graph()) {
            let (q, kv, affine) = (model.value(op.q)?, model.value(op.kv)?, Affine::read(model, &op.params)?);
            return Ok(Self::Pool { op, q, kv, affine });
        }
        match AttentionOperands::of(model.graph()).pop() {
            Some(last) => Ok(Self::ClassToken(Operands::read(model, last)?)),
            None => Err(Error::failure("the model attends to nothing")),
        }
    }

    /// The map of the image in `slot` of that batch.
    pub fn of(&self, batch: &PackedBatch, slot: usize) -> PoolingMap {
        let image = batch.range(slot);
        // Of each head, the probabilities of the image's last tokens.
        let mut heads: Vec<Vec<f32>> = Vec::new();
        match self {
            Self::Pool { op, q, kv, affine } => {
                let pooled = image.end.min(image.start + op.skip)..image.end;
                let mut take = |row: &[f32], _| heads.push(row.to_vec());
                pool::probabilities(&op.config, q, kv, affine.borrowed(), pooled, &mut take);
            }
            Self::ClassToken(operands) => {
                for head in 0..operands.op.config.heads {
                    let class_token = image.start..image.start + 1;
                    operands
                        .probabilities(image.clone(), head, class_token, |row, _| heads.push(row.to_vec()));
                }
            }
        }
        let [rows, cols] = batch.grids[slot].map(usize::from);
        let mut prefix = 0.0;
        let count = heads.len() as f64;
        let attended = heads.first().map_or(0, Vec::len);
        let placed = heads.into_iter().map(|probabilities| {
            let mut map = vec![0.0; rows * cols];
            let positions = &batch.positions[image.end - probabilities.len()..image.end];
            for (p, position) in probabilities.into_iter().zip(positions) {
                match *position {
                    PREFIX => prefix += f64::from(p) / count,
                    [row, col] => map[usize::from(row) * cols + usize::from(col)] = p,
                }
            }
            map
        });
        PoolingMap { rows, cols, heads: placed.collect(), attended, prefix }
    }
}
