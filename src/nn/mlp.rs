//! Two-layer perceptron with GELU.

use super::linear::{column_parameters, columns, linear, linear_gelu, row_parameters, rows};
use crate::autograd::Split;
use crate::autograd::graph::{Graph, Tensor};
use crate::autograd::sharded::Affine;
use crate::recipe::ModelConfig;
use crate::recipe::shapes::Dimensions;

/// `{name}.fc1` and `{name}.fc2`.
pub fn mlp_parameters(graph: &mut Graph, name: &str, config: &ModelConfig, dims: &Dimensions) -> [Affine; 2] {
    let (width, hidden, bias) = (dims.width, dims.mlp, config.mlp_bias);
    [
        row_parameters(graph, &format!("{name}.fc1"), [width, hidden], bias, Split::Rows(1)),
        column_parameters(graph, &format!("{name}.fc2"), [hidden, width], bias),
    ]
}

/// `{name}.fc1`, GELU, `{name}.fc2`.
pub fn mlp(graph: &mut Graph, name: &str, x: Tensor, config: &ModelConfig, dims: &Dimensions) -> Tensor {
    let [fc1, fc2] = mlp_parameters(graph, name, config, dims);
    let hidden = rows(graph, x, fc1, Some(config.gelu));
    columns(graph, hidden, fc2)
}

/// The same over rows that all ranks of the tensor axis have: each of them computes all of it.
pub fn whole_mlp(
    graph: &mut Graph,
    name: &str,
    x: Tensor,
    config: &ModelConfig,
    dims: &Dimensions,
) -> Tensor {
    let hidden = linear_gelu(graph, &format!("{name}.fc1"), x, dims.mlp, config.mlp_bias, config.gelu);
    linear(graph, &format!("{name}.fc2"), hidden, dims.width, config.mlp_bias)
}
