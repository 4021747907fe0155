//! Multi-head self attention with QK-norm.

use super::linear::{linear, vector};
use crate::autograd::attention::{self, QkParams};
use crate::autograd::graph::{Graph, Tensor};
use crate::cpu::attention::AttentionConfig;
use crate::recipe::shapes::Dimensions;
use crate::recipe::{ModelConfig, QkNormKind};

/// Constants of the attention op under `config`; `norm` is the QK-norm to use.
pub fn attention_config(config: &ModelConfig, dims: &Dimensions, norm: QkNormKind) -> AttentionConfig {
    let scale = match config.attention_scale {
        0.0 => 1.0 / (dims.head_dim as f64).sqrt(),
        scale => scale,
    };
    AttentionConfig {
        heads: dims.heads,
        head_dim: dims.head_dim,
        scale,
        norm,
        eps: config.qk_norm_eps,
        gain_per_head: config.qk_norm_per_head,
    }
}

/// Registers `{name}.{q_norm,k_norm}.{gain,bias}` as `op` needs them.
pub fn qk_params(graph: &mut Graph, name: &str, op: &AttentionConfig) -> QkParams {
    let len = if op.gain_per_head { op.heads * op.head_dim } else { op.head_dim };
    let gain = op.norm != QkNormKind::None;
    let bias = op.norm == QkNormKind::LayerNormBias;
    let mut part =
        |wanted: bool, part: &str, value| wanted.then(|| vector(graph, format!("{name}.{part}"), len, value));
    QkParams {
        q_gain: part(gain, "q_norm.gain", 1.0),
        k_gain: part(gain, "k_norm.gain", 1.0),
        q_bias: part(bias, "q_norm.bias", 0.0),
        k_bias: part(bias, "k_norm.bias", 0.0),
    }
}

/// `{name}.qkv`, QK-norm, attention within each image, `{name}.proj`.
pub fn self_attention(
    graph: &mut Graph,
    name: &str,
    x: Tensor,
    config: &ModelConfig,
    dims: &Dimensions,
) -> Tensor {
    let op = attention_config(config, dims, config.qk_norm);
    let qkv = linear(graph, &format!("{name}.qkv"), x, 3 * dims.heads * dims.head_dim, config.qkv_bias);
    let params = qk_params(graph, name, &op);
    let out = attention::attention(graph, qkv, params, op);
    linear(graph, &format!("{name}.proj"), out, dims.width, config.proj_bias)
}
