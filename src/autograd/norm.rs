//! LayerNorm and RMSNorm.
//!
//! `y = n ⊙ γ + β` with `n = (x − μ)·rstd`. Rule, with `g = dy ⊙ γ`:
//! `dx = rstd·(g − mean(g) − n·mean(g ⊙ n))` (RMSNorm: μ = 0 and no `mean(g)`),
//! `dγ += Σ dy ⊙ n`, `dβ += Σ dy`.

use super::graph::{Graph, Node, Tensor};
use super::op::{Io, Op, on_cpu};
use crate::cpu;
use crate::recipe::NormKind;

/// Normalises the rows of `x[m, D]`; `gain[D]` and `bias[D]` may be absent.
pub fn norm(
    graph: &mut Graph,
    x: Tensor,
    gain: Option<Tensor>,
    bias: Option<Tensor>,
    kind: NormKind,
    eps: f64,
) -> Tensor {
    let y = graph.activation_like(x);
    let (rows, extent) = (graph.info(x).rows, graph.info(x).extent);
    let stats = graph.activation(rows, 2, extent);
    graph.record(Norm { kind, eps }, vec![Some(x), gain, bias], vec![Some(y), Some(stats)]);
    y
}

#[derive(Debug)]
struct Norm {
    kind: NormKind,
    eps: f64,
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        match self.kind {
            NormKind::LayerNorm => "layernorm",
            NormKind::Rms => "rmsnorm",
        }
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(0).1;
            let (y, stats) = (a.output(0), a.output(1));
            let (gain, bias) = (a.input_opt(1), a.input_opt(2));
            cpu::norm::forward(y, stats, a.input(0), gain, bias, width, self.kind, self.eps);
        });
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dy) = grads[0] else { return vec![None; 3] };
        let x = node.input(0);
        let dx = graph.activation_like(x);
        let dgain = node.inputs[1].and_then(|t| graph.gradient_of(t));
        let dbias = node.inputs[2].and_then(|t| graph.gradient_of(t));
        graph.record(
            NormGrad(self.kind),
            vec![Some(dy), Some(x), node.outputs[1], node.inputs[1]],
            vec![Some(dx), dgain, dbias],
        );
        vec![Some(dx), None, None]
    }
}

#[derive(Debug)]
struct NormGrad(NormKind);

impl Op for NormGrad {
    fn name(&self) -> &'static str {
        "d norm"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(1).1;
            let (dx, dgain, dbias) = (a.output(0), a.output_opt(1), a.output_opt(2));
            let (dy, x, stats) = (a.input(0), a.input(1), a.input(2));
            cpu::norm::backward(dx, dgain, dbias, dy, x, stats, a.input_opt(3), width, self.0);
        });
    }
}
