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

mod device;

use bytemuck::Pod;

use super::device::{Launch, Site};
use super::gemm::{BIAS_UNIT, GeluGrad, WEIGHT_UNIT};
use super::graph::{Extent, Graph, Node, Tensor, TensorInfo};
use super::op::{Args, Io, Op, Workload, on_cpu};
use super::split::Shard;
use crate::cpu::gemm;
use crate::cpu::real::Real;
use crate::cpu::simd::add_assign;
use crate::error::Result;
use crate::parallel::{Grads, Group, Layout, Operand, Rings, ShardedLinear, Sharding};
use crate::recipe::GeluKind;

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

#[derive(Debug)]
struct RowLinear {
    shard: Shard,
    gelu: Vec<Option<GeluKind>>,
}

impl RowLinear {
    fn forward<R: Real + Pod>(&self, a: &mut Args<'_, R>, group: &Group) -> Result<()> {
        let inner = a.input_shape(0).1;
        let widths: Vec<usize> = (0..self.gelu.len()).map(|i| a.input_shape(1 + 2 * i).0).collect();
        let outer: usize = widths.iter().sum();
        let layer = layer(Sharding::Row, [inner, outer], group.size())?;
        if let ([_], [gelu]) = (&widths[..], &self.gelu[..]) {
            let (y, pre) = (a.output(0), a.output_opt(1));
            layer.forward(group, y, None, a.input(0), a.input(1), a.input_opt(2))?;
            activate(y, pre, *gelu);
            return Ok(());
        }
        let weight = (0..widths.len()).map(|i| a.input(1 + 2 * i)).collect::<Vec<_>>().concat();
        let biases: Vec<_> = widths.iter().enumerate().map(|(i, w)| (a.input_opt(2 + 2 * i), *w)).collect();
        let bias = join_biases(&biases);
        let mut all = vec![R::ZERO; a.output_shape(0).0 * outer];
        layer.forward(group, &mut all, None, a.input(0), &weight, bias.as_deref())?;
        let mut first = 0;
        for (i, &width) in widths.iter().enumerate() {
            let (y, pre) = (a.output(2 * i), a.output_opt(2 * i + 1));
            y.chunks_exact_mut(width).zip(columns(&all, outer, first, width)).for_each(|(y, row)| {
                y.copy_from_slice(row);
            });
            activate(y, pre, self.gelu[i]);
            first += width;
        }
        Ok(())
    }
}

/// `pre = y`, `y = gelu(y)`, where there is one.
fn activate<R: Real>(y: &mut [R], pre: Option<&mut [R]>, gelu: Option<GeluKind>) {
    let Some(kind) = gelu else { return };
    match pre {
        Some(pre) => {
            pre.copy_from_slice(y);
            gemm::gelu(y, pre, kind);
        }
        None => {
            let pre = y.to_vec();
            gemm::gelu(y, &pre, kind);
        }
    }
}

impl Op for RowLinear {
    fn name(&self) -> &'static str {
        "row linear"
    }

    fn run(&self, _: Io<'_>) {
        unreachable!("ranks compute a row linear layer together");
    }

    fn communicates(&self) -> bool {
        true
    }

    fn communicate(&self, io: Io<'_>, group: &Group) -> Result<()> {
        on_cpu!(io, |a| self.forward(&mut a, group))
    }

    fn sends(&self, graph: &Graph, node: &Node, rank: usize) -> u64 {
        sent(Sharding::Row, graph.info(node.input(0)).cols, graph.info(node.output(0)).rows, rank, self.shard)
    }

    /// Rings of x, and of several layers weights and results joined; after them, pre-activations that nobody reads.
    fn scratch(&self, graph: &Graph, node: &Node, read: &[bool]) -> usize {
        let tokens = graph.info(node.output(0)).rows;
        let [weights, outer, _] = weights_of(graph, node, 1, 2);
        let joined = if self.gelu.len() > 1 { weights + (tokens + 1) * outer } else { 0 };
        let unread = |(i, gelu): (usize, &Option<GeluKind>)| match gelu {
            Some(_) if !read[2 * i + 1] => graph.info(node.output(2 * i)).len(),
            _ => 0,
        };
        let unread = self.gelu.iter().enumerate().map(unread).max().unwrap_or(0);
        joined + chunks_held(1, graph.info(node.input(0))).max(unread)
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        device::row_linear(&self.gelu, site)
    }

    fn multiples(&self, i: usize) -> [usize; 2] {
        match i {
            0 => [1, 1],
            _ if i % 2 == 1 => WEIGHT_UNIT,
            _ => BIAS_UNIT,
        }
    }

    /// Pre-activations serve the backward rule alone.
    fn optional(&self, i: usize) -> bool {
        i % 2 == 1
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let x = node.input(0);
        let dx = graph.activation_like(x);
        let (mut inputs, mut outputs) = (vec![Some(x)], vec![Some(dx)]);
        for (i, gelu) in self.gelu.iter().enumerate() {
            let Some(dy) = grads[2 * i] else { continue };
            let dpre = match gelu {
                Some(kind) => {
                    let dpre = graph.activation_like(dy);
                    let pre = node.outputs[2 * i + 1];
                    graph.record(GeluGrad(*kind), vec![Some(dy), pre], vec![Some(dpre)]);
                    dpre
                }
                None => dy,
            };
            let weight = node.input(1 + 2 * i);
            inputs.extend([Some(dpre), Some(weight)]);
            let db = node.inputs[2 + 2 * i].and_then(|bias| graph.gradient_of(bias));
            outputs.extend([graph.gradient_of(weight), db]);
        }
        graph.record(RowLinearGrad(self.shard), inputs, outputs);
        let mut answer = vec![None; node.inputs.len()];
        answer[0] = Some(dx);
        answer
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        flops(graph, work, node.inputs[1..].iter().step_by(2))
    }
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

#[derive(Debug)]
struct RowLinearGrad(Shard);

impl RowLinearGrad {
    fn backward<R: Real + Pod>(a: &mut Args<'_, R>, group: &Group) -> Result<()> {
        let parts = a.inputs.len() / 2;
        let inner = a.input_shape(0).1;
        let widths: Vec<usize> = (0..parts).map(|i| a.input_shape(2 + 2 * i).0).collect();
        let outer: usize = widths.iter().sum();
        let layer = layer(Sharding::Row, [inner, outer], group.size())?;
        let (dx, x) = (a.output(0), Operand::Local(a.input(0)));
        if parts == 1 {
            let grads = Grads { dx, dw: a.output(1), db: a.output_opt(2) };
            return layer.backward(group, grads, a.input(1), x, a.input(2));
        }
        let dys: Vec<_> = (0..parts).map(|i| (a.input(1 + 2 * i), widths[i])).collect();
        let weight = (0..parts).map(|i| a.input(2 + 2 * i)).collect::<Vec<_>>().concat();
        let (mut dw, mut db) = (vec![R::ZERO; weight.len()], vec![R::ZERO; outer]);
        let grads = Grads { dx, dw: &mut dw, db: Some(&mut db) };
        layer.backward(group, grads, &join_columns(&dys), x, &weight)?;
        let mut first = 0;
        for (i, &width) in widths.iter().enumerate() {
            add_assign(a.output(1 + 2 * i), &dw[first * inner..][..width * inner]);
            if let Some(own) = a.output_opt(2 + 2 * i) {
                add_assign(own, &db[first..first + width]);
            }
            first += width;
        }
        Ok(())
    }
}

impl Op for RowLinearGrad {
    fn name(&self) -> &'static str {
        "d row linear"
    }

    fn run(&self, _: Io<'_>) {
        unreachable!("ranks compute a row linear layer together");
    }

    fn communicates(&self) -> bool {
        true
    }

    fn communicate(&self, io: Io<'_>, group: &Group) -> Result<()> {
        on_cpu!(io, |a| Self::backward(&mut a, group))
    }

    /// x is gathered again, and dx reduced.
    fn sends(&self, graph: &Graph, node: &Node, rank: usize) -> u64 {
        let (x, dy) = (graph.info(node.input(0)), graph.info(node.input(1)));
        2 * sent(Sharding::Row, x.cols, dy.rows, rank, self.0)
    }

    /// Rings of x and of dx, and of several layers gradients of results, weights and theirs joined.
    fn scratch(&self, graph: &Graph, node: &Node, _: &[bool]) -> usize {
        let tokens = graph.info(node.input(1)).rows;
        let [weights, outer, _] = weights_of(graph, node, 2, 2);
        let joined = if node.inputs.len() > 3 { 2 * weights + (tokens + 1) * outer } else { 0 };
        joined + chunks_held(2, graph.info(node.input(0)))
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        device::row_linear_grad(site)
    }

    fn multiples(&self, i: usize) -> [usize; 2] {
        if i > 0 && i.is_multiple_of(2) { WEIGHT_UNIT } else { [1, 1] }
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        2.0 * flops(graph, work, node.inputs[2..].iter().step_by(2))
    }
}

#[derive(Debug)]
struct ColumnLinear(Shard);

impl ColumnLinear {
    fn forward<R: Real + Pod>(a: &mut Args<'_, R>, group: &Group) -> Result<()> {
        let parts = a.inputs.len() / 3;
        let outer = a.input_shape(1).0;
        let widths: Vec<usize> = (0..parts).map(|i| a.input_shape(3 * i).1).collect();
        let layer = layer(Sharding::Column, [widths.iter().sum(), outer], group.size())?;
        let y = a.output(0);
        if parts == 1 {
            return layer.forward(group, y, None, a.input(0), a.input(1), a.input_opt(2));
        }
        let joined = |at: usize| {
            let all: Vec<_> = (0..parts).map(|i| (a.input(3 * i + at), widths[i])).collect();
            join_columns(&all)
        };
        let bias =
            (0..parts).filter_map(|i| a.input_opt(3 * i + 2)).fold(None, |sum: Option<Vec<R>>, bias| {
                let mut sum = sum.unwrap_or_else(|| vec![R::ZERO; outer]);
                add_assign(&mut sum, bias);
                Some(sum)
            });
        layer.forward(group, y, None, &joined(0), &joined(1), bias.as_deref())
    }
}

impl Op for ColumnLinear {
    fn name(&self) -> &'static str {
        "column linear"
    }

    fn run(&self, _: Io<'_>) {
        unreachable!("ranks compute a column linear layer together");
    }

    fn communicates(&self) -> bool {
        true
    }

    fn communicate(&self, io: Io<'_>, group: &Group) -> Result<()> {
        on_cpu!(io, |a| Self::forward(&mut a, group))
    }

    fn sends(&self, graph: &Graph, node: &Node, rank: usize) -> u64 {
        let (x, y) = (graph.info(node.input(0)), graph.info(node.output(0)));
        sent(Sharding::Column, y.cols, x.rows, rank, self.0)
    }

    /// Rings of y, and of several layers operands and weights joined.
    fn scratch(&self, graph: &Graph, node: &Node, _: &[bool]) -> usize {
        let [weights, _, inner] = weights_of(graph, node, 1, 3);
        let tokens = graph.info(node.input(0)).rows;
        let joined = if node.inputs.len() > 3 { weights + tokens * inner } else { 0 };
        joined + chunks_held(1, graph.info(node.output(0)))
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        device::column_linear(site)
    }

    fn multiples(&self, i: usize) -> [usize; 2] {
        [[1, 1], WEIGHT_UNIT, BIAS_UNIT][i % 3]
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let mut answer = vec![None; node.inputs.len()];
        let Some(dy) = grads[0] else { return answer };
        let (mut inputs, mut outputs) = (vec![Some(dy)], Vec::new());
        for (i, part) in node.inputs.chunks(3).enumerate() {
            let (x, weight) = (node.input(3 * i), node.input(3 * i + 1));
            let dx = graph.activation_like(x);
            inputs.extend([Some(x), Some(weight), None]);
            let db = part[2].and_then(|bias| graph.gradient_of(bias));
            outputs.extend([Some(dx), graph.gradient_of(weight), db]);
            answer[3 * i] = Some(dx);
        }
        let gelu = vec![None; node.inputs.len() / 3];
        graph.record(ColumnLinearGrad { shard: self.0, gelu }, inputs, outputs);
        answer
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        flops(graph, work, node.inputs[1..].iter().step_by(3))
    }
}

/// Operands are dy, then x_i, W_i and, where GELU was taken of x_i before, what it was taken of: the gradient of that
/// is the result then, in place of that of x_i.
#[derive(Debug)]
pub(in crate::autograd) struct ColumnLinearGrad {
    pub shard: Shard,
    /// Of each operand.
    pub gelu: Vec<Option<GeluKind>>,
}

impl ColumnLinearGrad {
    fn backward<R: Real + Pod>(&self, a: &mut Args<'_, R>, group: &Group) -> Result<()> {
        let parts = self.gelu.len();
        let outer = a.input_shape(2).0;
        let widths: Vec<usize> = (0..parts).map(|i| a.input_shape(1 + 3 * i).1).collect();
        let inner: usize = widths.iter().sum();
        let layer = layer(Sharding::Column, [inner, outer], group.size())?;
        let joined = |at: usize| {
            let all: Vec<_> = (0..parts).map(|i| (a.input(3 * i + at), widths[i])).collect();
            join_columns(&all)
        };
        let (x, weight) = (joined(1), joined(2));
        let (mut dx, mut dw) = (vec![R::ZERO; x.len()], vec![R::ZERO; weight.len()]);
        let mut db = vec![R::ZERO; outer];
        let grads = Grads { dx: &mut dx, dw: &mut dw, db: Some(&mut db) };
        layer.backward(group, grads, a.input(0), Operand::Local(&x), &weight)?;
        let mut first = 0;
        for (i, &width) in widths.iter().enumerate() {
            let (own_dx, own_dw) = (a.output(3 * i), a.output(3 * i + 1));
            own_dx.chunks_exact_mut(width).zip(columns(&dx, inner, first, width)).for_each(|(own, row)| {
                own.copy_from_slice(row);
            });
            if let Some(kind) = self.gelu[i] {
                gemm::gelu_grad(own_dx, a.input(3 + 3 * i), kind);
            }
            own_dw.chunks_exact_mut(width).zip(columns(&dw, inner, first, width)).for_each(|(own, row)| {
                add_assign(own, row);
            });
            if let Some(own) = a.output_opt(3 * i + 2) {
                add_assign(own, &db);
            }
            first += width;
        }
        Ok(())
    }
}

impl Op for ColumnLinearGrad {
    fn name(&self) -> &'static str {
        "d column linear"
    }

    fn run(&self, _: Io<'_>) {
        unreachable!("ranks compute a column linear layer together");
    }

    fn communicates(&self) -> bool {
        true
    }

    fn communicate(&self, io: Io<'_>, group: &Group) -> Result<()> {
        on_cpu!(io, |a| self.backward(&mut a, group))
    }

    fn sends(&self, graph: &Graph, node: &Node, rank: usize) -> u64 {
        let (dy, x) = (graph.info(node.input(0)), graph.info(node.input(1)));
        sent(Sharding::Column, dy.cols, x.rows, rank, self.shard)
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        device::column_linear_grad(&self.gelu, site)
    }

    fn multiples(&self, i: usize) -> [usize; 2] {
        if i % 3 == 2 { WEIGHT_UNIT } else { [1, 1] }
    }

    /// Rings of dy, and operands, weights and the gradients of both joined.
    fn scratch(&self, graph: &Graph, node: &Node, _: &[bool]) -> usize {
        let [weights, _, inner] = weights_of(graph, node, 2, 3);
        let tokens = graph.info(node.input(1)).rows;
        2 * (weights + tokens * inner) + chunks_held(1, graph.info(node.input(0)))
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        2.0 * flops(graph, work, node.inputs[2..].iter().step_by(3))
    }
}

#[derive(Debug)]
struct OwnRows(Shard);

impl Op for OwnRows {
    fn name(&self) -> &'static str {
        "own rows"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let cols = a.input_shape(0).1;
            let first = self.0.rank * (a.batch.tokens() / self.0.size) * cols;
            let out = a.output(0);
            if !out.is_empty() {
                out.copy_from_slice(&a.input(0)[first..first + out.len()]);
            }
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        device::own_rows(self.0, site)
    }

    fn backward(&self, graph: &mut Graph, _: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        vec![grads[0].map(|dy| all_rows(graph, dy))]
    }
}

#[derive(Debug)]
struct AllRows(Shard);

impl Op for AllRows {
    fn name(&self) -> &'static str {
        "all rows"
    }

    fn run(&self, _: Io<'_>) {
        unreachable!("ranks gather rows together");
    }

    fn communicates(&self) -> bool {
        true
    }

    fn communicate(&self, io: Io<'_>, group: &Group) -> Result<()> {
        on_cpu!(io, |a| group.all_gather(a.output(0), a.input(0)))
    }

    fn sends(&self, graph: &Graph, node: &Node, _: usize) -> u64 {
        ((self.0.size - 1) * graph.info(node.input(0)).len()) as u64
    }

    /// Messages.
    fn scratch(&self, graph: &Graph, node: &Node, _: &[bool]) -> usize {
        (self.0.size - 1) * graph.info(node.input(0)).len()
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        device::all_rows(site)
    }

    fn backward(&self, graph: &mut Graph, _: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        vec![grads[0].map(|dy| own_rows(graph, dy))]
    }
}
