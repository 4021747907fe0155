//! Multi-head self attention with QK-norm.

use super::linear::{column_parameters, columns, row_parameters, rows, vector_split};
use crate::autograd::Split;
use crate::autograd::attention::{self, QkParams};
use crate::autograd::graph::{Graph, Tensor};
use crate::autograd::sharded::Affine;
use crate::cpu::attention::AttentionConfig;
use crate::recipe::shapes::Dimensions;
use crate::recipe::{ModelConfig, QkNormKind, Rope};

/// Constants of the attention op of a block.
pub fn attention_config(config: &ModelConfig, dims: &Dimensions) -> AttentionConfig {
    let norm = config.qk_norm;
    AttentionConfig { kv_heads: dims.kv_heads, rope: config.rope.kind, ..pooling_config(config, dims, norm) }
}

/// Those of attention pooling, which has a kv head for each query head and turns nothing; `norm` is the QK-norm to
/// use.
pub fn pooling_config(config: &ModelConfig, dims: &Dimensions, norm: QkNormKind) -> AttentionConfig {
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
    let len = |heads: usize| if op.gain_per_head { heads * op.head_dim } else { op.head_dim };
    let (q_len, k_len) = (len(op.heads), len(op.kv_heads));
    let gain = op.norm != QkNormKind::None;
    let bias = op.norm == QkNormKind::LayerNormBias;
    let mut part = |wanted: bool, part: &str, len, value| {
        wanted.then(|| vector_split(graph, format!("{name}.{part}"), len, value, split))
    };
    QkParams {
        q_gain: part(gain, "q_norm.gain", q_len, 1.0),
        k_gain: part(gain, "k_norm.gain", k_len, 1.0),
        q_bias: part(bias, "q_norm.bias", q_len, 0.0),
        k_bias: part(bias, "k_norm.bias", k_len, 0.0),
    }
}

/// `{name}.qkv`, the parameters of QK-norm, and `{name}.proj`, of self attention. The tensor axis shares out query
/// heads and kv heads.
pub fn attention_parameters(
    graph: &mut Graph,
    name: &str,
    config: &ModelConfig,
    dims: &Dimensions,
) -> (Affine, QkParams, Affine) {
    let inner = dims.heads * dims.head_dim;
    let op = attention_config(config, dims);
    let by_heads = Split::queries_keys_values(op.group());
    let qkv = format!("{name}.qkv");
    let qkv = row_parameters(graph, &qkv, [dims.width, op.qkv_width()], config.qkv_bias, by_heads);
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

/// QK-norm, turns by `rope` and attention within each image, of this rank's heads.
pub fn attend(
    graph: &mut Graph,
    qkv: Tensor,
    params: QkParams,
    rope: Option<Tensor>,
    config: &ModelConfig,
    dims: &Dimensions,
) -> Tensor {
    let size = graph.shard().size;
    let own = Dimensions { heads: dims.heads / size, kv_heads: dims.kv_heads / size, ..*dims };
    attention::attention(graph, qkv, params, rope, attention_config(config, &own))
}

/// `{name}.qkv`, QK-norm, turns by `rope`, attention within each image, `{name}.proj`.
pub fn self_attention(
    graph: &mut Graph,
    name: &str,
    x: Tensor,
    rope: Option<Tensor>,
    config: &ModelConfig,
    dims: &Dimensions,
) -> Tensor {
    let (qkv, params, proj) = attention_parameters(graph, name, config, dims);
    let qkv = rows(graph, x, qkv, None);
    let out = attend(graph, qkv, params, rope, config, dims);
    columns(graph, out, proj)
}
