//! Multi-head self attention with QK-norm.

use super::linear::{column_parameters, columns, row_parameters, rows, vector_split};
use crate::autograd::Split;
use crate::autograd::attention::{self, QkParams};
use crate::autograd::graph::{Graph, Tensor};
use crate::autograd::sharded::Affine;
use crate::cpu::attention::AttentionConfig;
use crate::recipe::shapes::Dimensions;
use crate::recipe::{ModelConfig, QkNormKind, Rope};

/// Constants of the attention op under `config`; `norm` is the QK-norm to use.
pub fn attention_config(config: &ModelConfig, dims: &Dimensions, norm: QkNormKind) -> AttentionConfig {
    let scale = match config.attention_scale {
        0.0 => 1.0 / (dims.head_dim as f64).sqrt(),
        scale => scale,
    };
    AttentionConfig {
        heads: dims.heads,
        kv_heads: dims.heads,
        head_dim: dims.head_dim,
        scale,
        norm,
        eps: config.qk_norm_eps,
        gain_per_head: config.qk_norm_per_head,
        rope: Rope::None,
    }
}

/// Registers `{name}.{q_norm,k_norm}.{gain,bias}` as `op` needs them, whole.
pub fn qk_params(graph: &mut Graph, name: &str, op: &AttentionConfig) -> QkParams {
    qk_params_split(graph, name, op, Split::Whole)
}

fn qk_params_split(graph: &mut Graph, name: &str, op: &AttentionConfig, split: Split) -> QkParams {
    let len = if op.gain_per_head { op.heads * op.head_dim } else { op.head_dim };
    let gain = op.norm != QkNormKind::None;
    let bias = op.norm == QkNormKind::LayerNormBias;
    let mut part = |wanted: bool, part: &str, value| {
        wanted.then(|| vector_split(graph, format!("{name}.{part}"), len, value, split))
    };
    QkParams {
        q_gain: part(gain, "q_norm.gain", 1.0),
        k_gain: part(gain, "k_norm.gain", 1.0),
        q_bias: part(bias, "q_norm.bias", 0.0),
        k_bias: part(bias, "k_norm.bias", 0.0),
    }
}

/// `{name}.qkv`, the parameters of QK-norm, and `{name}.proj`, of self attention. The tensor axis shares out heads.
pub fn attention_parameters(
    graph: &mut Graph,
    name: &str,
    config: &ModelConfig,
    dims: &Dimensions,
) -> (Affine, QkParams, Affine) {
    let inner = dims.heads * dims.head_dim;
    let op = attention_config(config, dims, config.qk_norm);
    let qkv = format!("{name}.qkv");
    let qkv = row_parameters(graph, &qkv, [dims.width, 3 * inner], config.qkv_bias, 3);
    let split = match op.gain_per_head {
        true => Split::Rows(1),
        // Heads that share a gain are on all ranks.
        false if graph.shard().is_part() => Split::Summed,
        false => Split::Whole,
    };
    let qk = qk_params_split(graph, name, &op, split);
    let proj = column_parameters(graph, &format!("{name}.proj"), [inner, dims.width], config.proj_bias);
    (qkv, qk, proj)
}

/// QK-norm and attention within each image, of this rank's heads.
pub fn attend(
    graph: &mut Graph,
    qkv: Tensor,
    params: QkParams,
    config: &ModelConfig,
    dims: &Dimensions,
) -> Tensor {
    let own = Dimensions { heads: dims.heads / graph.shard().size, ..*dims };
    attention::attention(graph, qkv, params, attention_config(config, &own, config.qk_norm))
}

/// `{name}.qkv`, QK-norm, attention within each image, `{name}.proj`.
pub fn self_attention(
    graph: &mut Graph,
    name: &str,
    x: Tensor,
    config: &ModelConfig,
    dims: &Dimensions,
) -> Tensor {
    let (qkv, params, proj) = attention_parameters(graph, name, config, dims);
    let qkv = rows(graph, x, qkv, None);
    let out = attend(graph, qkv, params, config, dims);
    columns(graph, out, proj)
}
