//! Layers of whose outputs every rank has its part.

use bytemuck::Pod;

use super::super::device::{Launch, Site};
use super::super::elementwise::gelu_again;
use super::super::gemm::{BIAS_UNIT, GeluGrad, WEIGHT_UNIT};
use super::super::graph::{Graph, Node, Tensor};
use super::super::op::{Args, Io, Op, Workload, on_cpu};
use super::super::split::Shard;
use super::{chunks_held, columns, device, flops, join_biases, join_columns, layer, sent, weights_of};
use crate::cpu::gemm;
use crate::cpu::real::Real;
use crate::cpu::simd::add_assign;
use crate::error::Result;
use crate::parallel::{Grads, Group, Operand, Sharding};
use crate::recipe::GeluKind;

#[derive(Debug)]
pub(super) struct RowLinear {
    pub shard: Shard,
    /// Of each result.
    pub gelu: Vec<Option<GeluKind>>,
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

    fn recompute(&self, node: &Node, i: usize) -> Option<Node> {
        let kind = self.gelu[i / 2].filter(|_| i.is_multiple_of(2))?;
        Some(gelu_again(kind, node.outputs[i + 1], node.outputs[i]))
    }

    fn result(&self, i: usize) -> &'static str {
        match (self.gelu[i / 2], i % 2) {
            (None, _) => "linear",
            (_, 0) => "GELU",
            _ => "pre-activations",
        }
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
