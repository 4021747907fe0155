//! Sums of whole tensors: where gradients meet.

use super::graph::{Graph, Tensor};
use super::op::{Io, Op, on_cpu};
use crate::cpu;

/// `a + b`; the sum takes over the memory of `a` where it can.
pub fn add(graph: &mut Graph, a: Tensor, b: Tensor) -> Tensor {
    let sum = graph.activation_like(a);
    graph.record(Add, vec![Some(a), Some(b)], vec![Some(sum)]);
    sum
}

/// Adds `grad` to the gradient accumulator of the parameter `tensor`.
pub(super) fn accumulate(graph: &mut Graph, tensor: Tensor, grad: Tensor) {
    let target = graph.gradient_of(tensor);
    graph.record(Accumulate, vec![Some(grad)], vec![target]);
}

#[derive(Debug)]
struct Add;

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::elementwise::add(a.output(0), a.input(1)));
    }

    fn backward(&self, _: &mut Graph, _: &super::Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        vec![grads[0], grads[0]]
    }
}

#[derive(Debug)]
struct Accumulate;

impl Op for Accumulate {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::elementwise::add(a.output(0), a.input(0)));
    }
}

/// `x[m, D] + row[1, D]`, the row added to every row of `x`.
pub fn add_row(graph: &mut Graph, x: Tensor, row: Tensor) -> Tensor {
    let sum = graph.activation_like(x);
    graph.record(AddRow, vec![Some(x), Some(row)], vec![Some(sum)]);
    sum
}

#[derive(Debug)]
struct AddRow;

impl Op for AddRow {
    fn name(&self) -> &'static str {
        "add row"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::elementwise::add_row(a.output(0), a.input(1)));
    }

    fn backward(
        &self,
        graph: &mut Graph,
        node: &super::Node,
        grads: &[Option<Tensor>],
    ) -> Vec<Option<Tensor>> {
        let Some(dout) = grads[0] else { return vec![None; 2] };
        if let Some(drow) = graph.gradient_of(node.input(1)) {
            graph.record(SumRows, vec![Some(dout)], vec![Some(drow)]);
        }
        vec![Some(dout), None]
    }
}

/// Adds the column sums to a parameter's gradient.
#[derive(Debug)]
struct SumRows;

impl Op for SumRows {
    fn name(&self) -> &'static str {
        "d add row"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::gemm::bias_grad(a.output(0), a.input(0)));
    }
}
