//! Patch embedding.

use super::linear::linear;
use super::norm;
use crate::autograd::graph::{Graph, Tensor};
use crate::recipe::ModelConfig;
use crate::recipe::shapes::Dimensions;

/// `patch_embed`: a linear map of the flattened patches `[T, C·P²]`, with an optional norm before
/// (`patch_embed.norm_in`) and after (`patch_embed.norm_out`).
pub fn patch_embed(graph: &mut Graph, patches: Tensor, config: &ModelConfig, dims: &Dimensions) -> Tensor {
    let mut x = patches;
    if config.patch_norm_in {
        x = norm::layer(graph, "patch_embed.norm_in", x, config);
    }
    x = linear(graph, "patch_embed", x, dims.width, config.patch_bias);
    if config.patch_norm_out {
        x = norm::layer(graph, "patch_embed.norm_out", x, config);
    }
    x
}
