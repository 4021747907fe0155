//! Transformer blocks.
//!
//! On a tensor axis heads and the hidden width of the MLP are shared out, and token rows between them, so that
//! norms, LayerScale and residual connections are local. What a rank sends for a block, in parts of `[T/k, D]`:
//!
//! | block | forward | backward |
//! |---|---|---|
//! | serial | 2 gathers, 2 reduce-scatters | 4 gathers, 2 reduce-scatters |
//! | parallel | 1 gather, 1 reduce-scatter | 2 gathers, 1 reduce-scatter |
//! | parallel with LayerScale | 1 gather, 2 reduce-scatters | 3 gathers, 1 reduce-scatter |

use super::attention::{attend, attention_parameters, self_attention};
use super::linear::vector;
use super::mlp::{mlp, mlp_parameters};
use super::norm;
use crate::autograd::graph::{Graph, Tensor};
use crate::autograd::residual::{DropPath, residual};
use crate::autograd::sharded::{column_linear, row_linear};
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
/// `x += γ1·attn(y) + γ2·mlp(y)` with `y = norm1(x)`, both branches kept or dropped together. `rope` is the table of
/// the rotary position embedding, where the model has one.
pub fn block(
    graph: &mut Graph,
    index: usize,
    x: Tensor,
    rope: Option<Tensor>,
    config: &ModelConfig,
    dims: &Dimensions,
    training: bool,
) -> Tensor {
    let name = format!("blocks.{index}");
    let rate = if training { drop_path_rate(config, index, dims.depth) } else { 0.0 };
    let drop_path = |branch: usize| Some(DropPath { rate, branch: (2 * index + branch) as u32 });
    let scale = |graph: &mut Graph, n: usize| {
        (config.layer_scale > 0.0).then(|| {
            let scale = vector(graph, format!("{name}.scale{n}"), dims.width, config.layer_scale as f32);
            if graph.shard().is_part() {
                graph.sum_gradient(scale);
            }
            scale
        })
    };

    let y = norm::layer(graph, &format!("{name}.norm1"), x, config);
    if config.block == BlockKind::Parallel && graph.shard().is_part() {
        let (qkv, qk, proj) = attention_parameters(graph, &format!("{name}.attn"), config, dims);
        let scale1 = scale(graph, 1);
        let [fc1, fc2] = mlp_parameters(graph, &format!("{name}.mlp"), config, dims);
        let scale2 = scale(graph, 2);
        let both = row_linear(graph, y, &[(qkv, None), (fc1, Some(config.gelu))]);
        let attended = attend(graph, both[0], qk, rope, config, dims);
        let branches = [(attended, proj), (both[1], fc2)];
        if scale1.is_none() {
            let sum = column_linear(graph, &branches);
            return residual(graph, x, sum, None, drop_path(0));
        }
        return branches.into_iter().zip([scale1, scale2]).fold(x, |x, (branch, scale)| {
            let branch = column_linear(graph, &[branch]);
            residual(graph, x, branch, scale, drop_path(0))
        });
    }
    let attended = self_attention(graph, &format!("{name}.attn"), y, rope, config, dims);
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
