//! Linear layer and the treatment of its parameters.

use crate::autograd::graph::{Graph, Init, ParamSpec, Tensor};
use crate::autograd::sharded::{Affine, column_linear, row_linear};
use crate::autograd::{Split, gemm};
use crate::recipe::GeluKind;

/// A matrix: decays, starts truncated normal with standard deviation 0.02 (DeiT III) unless said otherwise.
pub fn matrix(graph: &mut Graph, name: String, rows: usize, cols: usize, init: Init) -> Tensor {
    matrix_split(graph, name, [rows, cols], init, Split::Whole)
}

/// The same, shared out over the tensor axis.
fn matrix_split(graph: &mut Graph, name: String, shape: [usize; 2], init: Init, split: Split) -> Tensor {
    graph.param_split(ParamSpec { name, shape: shape.to_vec(), init, decay: true, head: false }, split)
}

/// A gain or bias: does not decay, starts constant.
pub fn vector(graph: &mut Graph, name: String, len: usize, value: f32) -> Tensor {
    vector_split(graph, name, len, value, Split::Whole)
}

/// The same, shared out over the tensor axis.
pub fn vector_split(graph: &mut Graph, name: String, len: usize, value: f32, split: Split) -> Tensor {
    let init = Init::Constant(value);
    graph.param_split(ParamSpec { name, shape: vec![len], init, decay: false, head: false }, split)
}

/// Initialisation of the matrices of a block.
pub const WEIGHT_INIT: Init = Init::TruncatedNormal(0.02);

/// `{name}.weight [out, in]` and, where wanted, `{name}.bias [out]`.
pub fn linear(graph: &mut Graph, name: &str, x: Tensor, outer: usize, bias: bool) -> Tensor {
    let (weight, bias) = parameters(graph, name, x, outer, bias);
    gemm::linear(graph, x, weight, bias)
}

/// The same and a GELU.
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

/// `{name}.weight [out, in]` and, where wanted, `{name}.bias [out]`, of whose rows every rank of the tensor axis
/// has its part as `split` says.
pub fn row_parameters(
    graph: &mut Graph,
    name: &str,
    [inner, outer]: [usize; 2],
    bias: bool,
    split: Split,
) -> Affine {
    let weight = matrix_split(graph, format!("{name}.weight"), [outer, inner], WEIGHT_INIT, split);
    (weight, bias.then(|| vector_split(graph, format!("{name}.bias"), outer, 0.0, split)))
}

/// The same, of whose columns every rank has its part, and all of the bias.
pub fn column_parameters(graph: &mut Graph, name: &str, [inner, outer]: [usize; 2], bias: bool) -> Affine {
    let weight = matrix_split(graph, format!("{name}.weight"), [outer, inner], WEIGHT_INIT, Split::Columns);
    (weight, bias.then(|| vector(graph, format!("{name}.bias"), outer, 0.0)))
}

/// This rank's columns of a linear layer, of all tokens, from its rows of the tokens.
pub fn rows(graph: &mut Graph, x: Tensor, (weight, bias): Affine, gelu: Option<GeluKind>) -> Tensor {
    match gelu {
        _ if graph.shard().is_part() => row_linear(graph, x, &[((weight, bias), gelu)])[0],
        Some(kind) => gemm::linear_gelu(graph, x, weight, bias, kind),
        None => gemm::linear(graph, x, weight, bias),
    }
}

/// This rank's rows of a linear layer from its columns of the operand.
pub fn columns(graph: &mut Graph, x: Tensor, (weight, bias): Affine) -> Tensor {
    match graph.shard().is_part() {
        true => column_linear(graph, &[(x, (weight, bias))]),
        false => gemm::linear(graph, x, weight, bias),
    }
}
