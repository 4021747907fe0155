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
