//! Linear layer and the treatment of its parameters.

use crate::autograd::gemm;
use crate::autograd::graph::{Graph, Init, ParamSpec, Tensor};
use crate::recipe::GeluKind;

/// A matrix: decays, starts truncated normal with standard deviation 0.02 (DeiT III) unless said otherwise.
pub fn matrix(graph: &mut Graph, name: String, rows: usize, cols: usize, init: Init) -> Tensor {
    graph.param(ParamSpec { name, shape: vec![rows, cols], init, decay: true, head: false })
}

/// A gain or bias: does not decay, starts constant.
pub fn vector(graph: &mut Graph, name: String, len: usize, value: f32) -> Tensor {
    graph.param(ParamSpec { name, shape: vec![len], init: Init::Constant(value), decay: false, head: false })
}

/// Initialisation of the matrices of a block.
pub const WEIGHT_INIT: Init = Init::TruncatedNormal(0.02);

/// `{name}.weight [out, in]` and, where wanted, `{name}.bias [out]`.
pub fn linear(graph: &mut Graph, name: &str, x: Tensor, outer: usize, bias: bool) -> Tensor {
    let (weight, bias) = parameters(graph, name, x, outer, bias);
    gemm::linear(graph, x, weight, bias)
}

/// The same with GELU.
pub fn linear_gelu(
    graph: &mut Graph,
    name: &str,
    x: Tensor,
    outer: usize,
    bias: bool,
    kind: GeluKind,
) -> Tensor {
    let (weight, bias) = parameters(graph, name, x, outer, bias);
    gemm::linear_gelu(graph, x, weight, bias, kind)
}

fn parameters(
    graph: &mut Graph,
    name: &str,
    x: Tensor,
    outer: usize,
    bias: bool,
) -> (Tensor, Option<Tensor>) {
    let inner = graph.info(x).cols;
    let weight = matrix(graph, format!("{name}.weight"), outer, inner, WEIGHT_INIT);
    let bias = bias.then(|| vector(graph, format!("{name}.bias"), outer, 0.0));
    (weight, bias)
}
