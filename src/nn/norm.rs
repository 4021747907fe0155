//! Norm layer.

use super::linear::vector;
use crate::autograd::graph::{Extent, Graph, Tensor};
use crate::autograd::norm;
use crate::recipe::ModelConfig;

/// `{name}.gain [D]` and, with `norm_bias`, `{name}.bias [D]`.
pub fn layer(graph: &mut Graph, name: &str, x: Tensor, config: &ModelConfig) -> Tensor {
    let width = graph.info(x).cols;
    let gain = vector(graph, format!("{name}.gain"), width, 1.0);
    let bias = config.norm_bias.then(|| vector(graph, format!("{name}.bias"), width, 0.0));
    if matches!(graph.info(x).extent, Extent::Shard(_)) {
        graph.sum_gradient(gain);
        bias.inspect(|bias| graph.sum_gradient(*bias));
    }
    norm::norm(graph, x, Some(gain), bias, config.norm, config.norm_eps)
}
