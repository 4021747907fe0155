//! Linear layers with fused bias and GELU.
//!
//! | op | result |
//! |---|---|
//! | linear | `y = x wᵀ + b` |
//! | linear+gelu | `y = gelu(x wᵀ + b)`, the pre-activation kept for the rule |
//!
//! Rules: `dx = dy w`, `dw += dyᵀ x`, `db += Σ dy`; through GELU `dpre = dy ⊙ gelu'(pre)` first.

use super::graph::{Graph, Node, Tensor};
use super::op::{Io, Op, Workload, on_cpu};
use crate::cpu;
use crate::recipe::GeluKind;

/// `x[m, in] · w[out, in]ᵀ + bias[out]`.
pub fn linear(graph: &mut Graph, x: Tensor, weight: Tensor, bias: Option<Tensor>) -> Tensor {
    let y = result(graph, x, weight);
    graph.record(Linear, vec![Some(x), Some(weight), bias], vec![Some(y)]);
    y
}

/// `gelu(x · wᵀ + bias)` in one pass.
pub fn linear_gelu(
    graph: &mut Graph,
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    kind: GeluKind,
) -> Tensor {
    let y = result(graph, x, weight);
    let pre = graph.activation_like(y);
    graph.record(LinearGelu(kind), vec![Some(x), Some(weight), bias], vec![Some(y), Some(pre)]);
    y
}

fn result(graph: &mut Graph, x: Tensor, weight: Tensor) -> Tensor {
    let (inner, outer) = (graph.info(weight).cols, graph.info(weight).rows);
    let info = graph.info(x);
    let (rows, cols, extent) = (info.rows, info.cols, info.extent);
    assert_eq!(cols, inner, "linear: {} columns meet a weight of {inner}", cols);
    graph.activation(rows, outer, extent)
}

/// `2 · rows · in · out`, shared by the forward op and its two gradients.
fn product_flops(graph: &Graph, rows_of: Tensor, weight: Tensor, work: &Workload) -> f64 {
    let w = graph.info(weight);
    2.0 * work.rows(graph.info(rows_of)) * w.len() as f64
}

/// Records `dx`, `dw`, `db` of a linear layer from the gradient of its result.
fn linear_rule(graph: &mut Graph, node: &Node, dy: Tensor) -> Vec<Option<Tensor>> {
    let (x, weight) = (node.input(0), node.input(1));
    if let Some(dw) = graph.gradient_of(weight) {
        graph.record(WeightGrad, vec![Some(dy), Some(x)], vec![Some(dw)]);
    }
    if let Some(db) = node.inputs[2].and_then(|b| graph.gradient_of(b)) {
        graph.record(BiasGrad, vec![Some(dy)], vec![Some(db)]);
    }
    let dx = graph.info(x).requires_grad.then(|| {
        let dx = graph.activation_like(x);
        graph.record(InputGrad, vec![Some(dy), Some(weight)], vec![Some(dx)]);
        dx
    });
    vec![dx, None, None]
}

#[derive(Debug)]
struct Linear;

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (outer, inner) = a.input_shape(1);
            cpu::gemm::linear(a.output(0), a.input(0), a.input(1), a.input_opt(2), inner, outer);
        });
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        grads[0].map_or(vec![None; 3], |dy| linear_rule(graph, node, dy))
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        product_flops(graph, node.input(0), node.input(1), work)
    }
}

#[derive(Debug)]
struct LinearGelu(GeluKind);

impl Op for LinearGelu {
    fn name(&self) -> &'static str {
        "linear+gelu"
    }

    /// The pre-activation serves the backward rule alone.
    fn optional(&self, i: usize) -> bool {
        i == 1
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (outer, inner) = a.input_shape(1);
            let (y, pre) = (a.output(0), a.output_opt(1));
            let bias = a.input_opt(2);
            cpu::gemm::linear_gelu(y, pre, a.input(0), a.input(1), bias, inner, outer, self.0);
        });
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dy) = grads[0] else { return vec![None; 3] };
        let dpre = graph.activation_like(dy);
        graph.record(GeluGrad(self.0), vec![Some(dy), node.outputs[1]], vec![Some(dpre)]);
        linear_rule(graph, node, dpre)
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        product_flops(graph, node.input(0), node.input(1), work)
    }
}

#[derive(Debug)]
struct GeluGrad(GeluKind);

impl Op for GeluGrad {
    fn name(&self) -> &'static str {
        "d gelu"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::gemm::gelu_grad(a.output(0), a.input(1), self.0));
    }
}

#[derive(Debug)]
struct InputGrad;

impl Op for InputGrad {
    fn name(&self) -> &'static str {
        "d linear/x"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (outer, inner) = a.input_shape(1);
            cpu::gemm::linear_input_grad(a.output(0), a.input(0), a.input(1), inner, outer);
        });
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        product_flops(graph, node.input(0), node.input(1), work)
    }
}

#[derive(Debug)]
struct WeightGrad;

impl Op for WeightGrad {
    fn name(&self) -> &'static str {
        "d linear/w"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (outer, inner) = (a.input_shape(0).1, a.input_shape(1).1);
            cpu::gemm::linear_weight_grad(a.output(0), a.input(0), a.input(1), inner, outer);
        });
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        product_flops(graph, node.input(0), node.output(0), work)
    }
}

#[derive(Debug)]
struct BiasGrad;

impl Op for BiasGrad {
    fn name(&self) -> &'static str {
        "d linear/b"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::gemm::bias_grad(a.output(0), a.input(0)));
    }
}
