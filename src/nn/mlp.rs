//! Two-layer perceptron with GELU.

use super::linear::{linear, linear_gelu};
use crate::autograd::graph::{Graph, Tensor};
use crate::recipe::ModelConfig;
use crate::recipe::shapes::Dimensions;

/// `{name}.fc1`, GELU, `{name}.fc2`.
pub fn mlp(graph: &mut Graph, name: &str, x: Tensor, config: &ModelConfig, dims: &Dimensions) -> Tensor {
    let hidden = linear_gelu(graph, &format!("{name}.fc1"), x, dims.mlp, config.mlp_bias, config.gelu);
    linear(graph, &format!("{name}.fc2"), hidden, dims.width, config.mlp_bias)
}
