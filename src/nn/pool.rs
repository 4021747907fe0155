//! From tokens to one vector per image.

use super::attention::{pooling_config, qk_params};
use super::linear::linear;
use super::mlp::whole_mlp;
use super::norm;
use crate::autograd::graph::{Graph, Init, ParamSpec, Tensor};
use crate::autograd::{elementwise, pool};
use crate::recipe::shapes::Dimensions;
use crate::recipe::{ModelConfig, PoolKind, QkNormKind};

/// Pools `tokens[T, D]` to `[slots, D]`.
pub fn pool(
    graph: &mut Graph,
    tokens: Tensor,
    slots: usize,
    config: &ModelConfig,
    dims: &Dimensions,
) -> Tensor {
    let prefix = config.prefix();
    match config.pool {
        PoolKind::Map => attention_pool(graph, tokens, slots, config, dims),
        PoolKind::Mean => pool::mean_pool(graph, tokens, slots, prefix),
        PoolKind::Cls => pool::gather_token(graph, tokens, slots, 0),
    }
}

/// Multi-head attention pooling (Zhai et al. 2022): one learned query attends to the image's
/// patch tokens; with `pool_mlp`, a residual MLP follows.
fn attention_pool(
    graph: &mut Graph,
    tokens: Tensor,
    slots: usize,
    config: &ModelConfig,
    dims: &Dimensions,
) -> Tensor {
    let inner = dims.heads * dims.head_dim;
    let query = graph.param(ParamSpec {
        name: "pool.query".into(),
        shape: vec![1, dims.width],
        init: Init::TruncatedNormal(0.02),
        decay: false,
        head: false,
    });
    let normed = if config.pool_query_norm { norm::layer(graph, "pool.norm", query, config) } else { query };
    let q = linear(graph, "pool.q", normed, inner, config.qkv_bias);
    let kv = linear(graph, "pool.kv", tokens, 2 * inner, config.qkv_bias);
    let qk_norm = if config.pool_qk_norm { config.qk_norm } else { QkNormKind::None };
    let op = pooling_config(config, dims, qk_norm);
    let params = qk_params(graph, "pool", &op);
    let pooled = pool::attention_pool(graph, q, kv, params, op, slots, config.prefix());
    let mut x = linear(graph, "pool.proj", pooled, dims.width, config.proj_bias);
    if config.pool_residual {
        x = elementwise::add_row(graph, x, query);
    }
    if config.pool_mlp {
        let y = norm::layer(graph, "pool.norm_mlp", x, config);
        let mixed = whole_mlp(graph, "pool.mlp", y, config, dims);
        x = elementwise::add(graph, x, mixed);
    }
    x
}
