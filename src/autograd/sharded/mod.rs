//! Linear layers that the ranks of the tensor axis compute together, and token rows that go from all ranks to
//! one each and back.
//!
//! Between blocks every rank has some token rows (sequence parallelism, Korthikanti et al. 2022); inside, some
//! heads and some of the hidden width, of all tokens:
//!
//! | op | operands of a rank | results |
//! |---|---|---|
//! | row linear | x `[T/k, in]`, some rows of each weight | `y_i = x W_iᵀ + b_i`, `[T, out_i/k]`, with GELU or without |
//! | column linear | each x_i `[T, in_i/k]`, some columns of each weight | `y = Σ_i x_i W_iᵀ + b_i`, `[T/k, out]` |
//! | own rows | x `[T, D]`, the same on all ranks | `[T/k, D]` |
//! | all rows | x `[T/k, D]` | `[T, D]` |
//!
//! Several weights share one gather of x, or one reduction of y, as in the parallel blocks of ViT-22B (Dehghani
//! et al. 2023). Rules: those of the linear layers, chunk by chunk as [`crate::parallel::linear`] tells; own rows
//! and all rows are each other's.

mod column;
mod device;
mod row;
mod tokens;

pub(super) use column::ColumnLinearGrad;

use super::graph::{Extent, Graph, Node, Tensor, TensorInfo};
use super::op::Workload;
use super::split::Shard;
use crate::cpu::real::Real;
use crate::error::Result;
use crate::parallel::{Layout, Rings, ShardedLinear, Sharding};
use crate::recipe::GeluKind;
use column::ColumnLinear;
use row::RowLinear;
use tokens::{AllRows, OwnRows};

/// A weight and its bias.
pub type Affine = (Tensor, Option<Tensor>);

/// `x[T/k, in] · w[out/k, in]ᵀ + b` of all tokens, for each weight, with GELU where it is wanted.
pub fn row_linear(graph: &mut Graph, x: Tensor, parts: &[(Affine, Option<GeluKind>)]) -> Vec<Tensor> {
    let shard = graph.shard();
    let tokens = graph.info(x).rows * shard.size;
    let (mut inputs, mut outputs, mut results) = (vec![Some(x)], Vec::new(), Vec::new());
    for ((weight, bias), gelu) in parts {
        let width = graph.info(*weight).rows;
        let y = graph.activation(tokens, width, Extent::Tokens);
        let pre = gelu.map(|_| graph.activation_like(y));
        inputs.extend([Some(*weight), *bias]);
        outputs.extend([Some(y), pre]);
        results.push(y);
    }
    let gelu = parts.iter().map(|(_, gelu)| *gelu).collect();
    graph.record(RowLinear { shard, gelu }, inputs, outputs);
    results
}

/// `Σ x[T, in/k] · w[out, in/k]ᵀ + b`, this rank's rows of it.
pub fn column_linear(graph: &mut Graph, parts: &[(Tensor, Affine)]) -> Tensor {
    let shard = graph.shard();
    let (tokens, width) = (graph.info(parts[0].0).rows, graph.info(parts[0].1.0).rows);
    let y = graph.activation(tokens / shard.size, width, Extent::Shard(shard));
    let inputs = parts.iter().flat_map(|(x, (weight, bias))| [Some(*x), Some(*weight), *bias]).collect();
    graph.record(ColumnLinear(shard), inputs, vec![Some(y)]);
    y
}

/// This rank's token rows of `x`, which all ranks have.
pub fn own_rows(graph: &mut Graph, x: Tensor) -> Tensor {
    let shard = graph.shard();
    let (rows, cols) = (graph.info(x).rows / shard.size, graph.info(x).cols);
    let out = graph.activation(rows, cols, Extent::Shard(shard));
    graph.record(OwnRows(shard), vec![Some(x)], vec![Some(out)]);
    out
}

/// All token rows, of which every rank has some in `x`.
pub fn all_rows(graph: &mut Graph, x: Tensor) -> Tensor {
    let shard = graph.shard();
    let (rows, cols) = (graph.info(x).rows * shard.size, graph.info(x).cols);
    let out = graph.activation(rows, cols, Extent::Tokens);
    graph.record(AllRows(shard), vec![Some(x)], vec![Some(out)]);
    out
}

/// Elements that `rank` sends to the others in one run of the recorded nodes.
pub fn volume(graph: &Graph, order: &[usize], rank: usize) -> u64 {
    order.iter().map(|&i| graph.nodes[i].op.sends(graph, &graph.nodes[i], rank)).sum()
}

/// Both directions of a link are used where a ring has more than two ranks.
fn rings(size: usize) -> Rings {
    if size > 2 { Rings::Two } else { Rings::One }
}

fn layer(sharding: Sharding, [inner, outer]: [usize; 2], size: usize) -> Result<ShardedLinear> {
    let widths = match sharding {
        Sharding::Row => [inner, outer * size],
        Sharding::Column => [inner * size, outer],
    };
    ShardedLinear::new(sharding, Layout::Tokens, rings(size), widths, size)
}

/// `[a | b | …]` of matrices with these widths.
fn join_columns<R: Real>(parts: &[(&[R], usize)]) -> Vec<R> {
    let rows = parts.first().map_or(0, |(data, width)| data.len() / width);
    let mut joined = Vec::with_capacity(parts.iter().map(|(data, _)| data.len()).sum());
    for at in 0..rows {
        parts.iter().for_each(|(data, width)| joined.extend_from_slice(&data[at * width..(at + 1) * width]));
    }
    joined
}

/// Elements that so many rings of chunks like `chunk` hold: two buffers and a message each.
fn chunks_held(rings: usize, chunk: &TensorInfo) -> usize {
    3 * rings * chunk.len()
}

/// Elements of the weights among the operands from `first` on, one in every `step`, and of their rows and columns.
fn weights_of(graph: &Graph, node: &Node, first: usize, step: usize) -> [usize; 3] {
    let weights = node.inputs[first..].iter().step_by(step).flatten().map(|weight| graph.info(*weight));
    weights.fold([0; 3], |[len, rows, cols], weight| {
        [len + weight.len(), rows + weight.rows, cols + weight.cols]
    })
}

/// Columns `first..first + width` of a matrix of `stride` columns.
fn columns<R: Real>(data: &[R], stride: usize, first: usize, width: usize) -> impl Iterator<Item = &[R]> {
    data.chunks_exact(stride).map(move |row| &row[first..first + width])
}

/// Biases one after another, zeros for those that are absent where another is there.
fn join_biases<R: Real>(parts: &[(Option<&[R]>, usize)]) -> Option<Vec<R>> {
    parts.iter().any(|(bias, _)| bias.is_some()).then(|| {
        let one = |(bias, width): &(Option<&[R]>, usize)| bias.map_or(vec![R::ZERO; *width], <[R]>::to_vec);
        parts.iter().flat_map(one).collect()
    })
}

/// `2 · tokens · in · out` of this rank's parts of the weights.
fn flops<'a>(graph: &Graph, work: &Workload, weights: impl Iterator<Item = &'a Option<Tensor>>) -> f64 {
    2.0 * work.tokens * weights.flatten().map(|w| graph.info(*w).len() as f64).sum::<f64>()
}

/// Elements that a rank sends when chunks of `width` columns of `tokens` rows go round.
fn sent(sharding: Sharding, width: usize, tokens: usize, rank: usize, shard: Shard) -> u64 {
    let layer = layer(sharding, [width; 2], shard.size);
    layer.map_or(0, |layer| layer.forward_volume(rank, tokens).iter().sum())
}
