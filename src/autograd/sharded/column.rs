//! Layers of whose inputs every rank has its part.

use bytemuck::Pod;

use super::super::device::{Launch, Site};
use super::super::gemm::{BIAS_UNIT, WEIGHT_UNIT};
use super::super::graph::{Graph, Node, Tensor};
use super::super::op::{Args, Io, Op, Workload, on_cpu};
use super::super::split::Shard;
use super::{chunks_held, columns, device, flops, join_columns, layer, sent, weights_of};
use crate::cpu::gemm;
use crate::cpu::real::Real;
use crate::cpu::simd::add_assign;
use crate::error::Result;
use crate::parallel::{Grads, Group, Operand, Sharding};
use crate::recipe::GeluKind;

#[derive(Debug)]
pub(super) struct ColumnLinear(pub Shard);

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

    /// Of LayerScale's gradient.
    fn result(&self, _: usize) -> &'static str {
        "branches (LayerScale)"
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
