//! Transformer blocks.

use super::attention::self_attention;
use super::linear::vector;
use super::mlp::mlp;
use super::norm;
use crate::autograd::graph::{Graph, Tensor};
use crate::autograd::residual::{DropPath, residual};
use crate::recipe::shapes::Dimensions;
use crate::recipe::{BlockKind, ModelConfig};

/// Stochastic-depth rate of block `index`: the same everywhere (DeiT III), or rising linearly
/// from 0 to the full rate (timm).
pub fn drop_path_rate(config: &ModelConfig, index: usize, depth: usize) -> f64 {
    if config.drop_path_linear {
        config.drop_path * index as f64 / depth.saturating_sub(1).max(1) as f64
    } else {
        config.drop_path
    }
}

/// Block `index`. Serial: `x += γ1·attn(norm1(x))`, `x += γ2·mlp(norm2(x))`. Parallel (ViT-22B):
/// `x += γ1·attn(y) + γ2·mlp(y)` with `y = norm1(x)`, both branches kept or dropped together.
pub fn block(
    graph: &mut Graph,
    index: usize,
    x: Tensor,
    config: &ModelConfig,
    dims: &Dimensions,
    training: bool,
) -> Tensor {
    let name = format!("blocks.{index}");
    let rate = if training { drop_path_rate(config, index, dims.depth) } else { 0.0 };
    let drop_path = |branch: usize| Some(DropPath { rate, branch: (2 * index + branch) as u32 });
    let scale = |graph: &mut Graph, n: usize| {
        (config.layer_scale > 0.0)
            .then(|| vector(graph, format!("{name}.scale{n}"), dims.width, config.layer_scale as f32))
    };

    let y = norm::layer(graph, &format!("{name}.norm1"), x, config);
    let attended = self_attention(graph, &format!("{name}.attn"), y, config, dims);
    let scale1 = scale(graph, 1);
    let x = residual(graph, x, attended, scale1, drop_path(0));
    let (y, branch) = match config.block {
        BlockKind::Serial => (norm::layer(graph, &format!("{name}.norm2"), x, config), 1),
        BlockKind::Parallel => (y, 0),
    };
    let mixed = mlp(graph, &format!("{name}.mlp"), y, config, dims);
    let scale2 = scale(graph, 2);
    residual(graph, x, mixed, scale2, drop_path(branch))
}
