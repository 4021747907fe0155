//! transformers' `Siglip2VisionModel`: linear patch embedding over (row, column, channel), a learned table
//! resized with an antialiased triangle filter, MAP head with MLP, GELU with tanh, no classifier.

use super::Weights;
use super::conversion::Conversion;
use super::timm::{patch_linear, table};
use crate::Result;
use crate::recipe::{
    BlockKind, GeluKind, ModelConfig, NormKind, PoolKind, PositionCoordinate, PositionResample,
};

/// The vision tower, alone or (`vision_model.`) beside a text tower, which is left out.
pub(super) fn vision(mut c: Conversion, model: &mut ModelConfig) -> Result<Weights> {
    let at = if c.has("embeddings.patch_embedding.weight") { "" } else { "vision_model." };
    for name in c.names() {
        if !at.is_empty() && !name.starts_with(at) {
            c.take(&name)?;
        }
    }
    patch_linear(&mut c, model, &format!("{at}embeddings.patch_embedding"))?;
    let positions = format!("{at}embeddings.position_embedding.weight");
    let [rows, width] = c.shape(&positions)?;
    let side = rows.isqrt();
    if side * side != rows {
        return Err(c.error(format_args!("{positions} has {rows} rows, which is no square grid")));
    }
    let values = c.take_len(&positions, rows * width)?;
    model.position.coordinate = PositionCoordinate::Fractional;
    model.position.resample = PositionResample::Bilinear;
    table(&mut c, model, (side, side), width, values);
    c.heads(model, width, None)?;

    let depth = (0..).take_while(|n| c.has(&format!("{at}encoder.layers.{n}.layer_norm1.weight"))).count();
    for n in 0..depth {
        let (from, to) = (format!("{at}encoder.layers.{n}"), format!("blocks.{n}"));
        c.norm(&format!("{from}.layer_norm1"), &format!("{to}.norm1"))?;
        c.norm(&format!("{from}.layer_norm2"), &format!("{to}.norm2"))?;
        let parts = ["q", "k", "v"].map(|part| format!("{from}.self_attn.{part}_proj"));
        c.join_linear(&parts, &format!("{to}.attn.qkv"))?;
        c.linear(&format!("{from}.self_attn.out_proj"), &format!("{to}.attn.proj"))?;
        c.linear(&format!("{from}.mlp.fc1"), &format!("{to}.mlp.fc1"))?;
        c.linear(&format!("{from}.mlp.fc2"), &format!("{to}.mlp.fc2"))?;
    }
    c.norm(&format!("{at}post_layernorm"), "norm")?;

    let probe = c.take_len(&format!("{at}head.probe"), width)?;
    c.put("pool.query", &[1, width], probe);
    for (kind, columns) in [("weight", width), ("bias", 1)] {
        let mut q = c.take_len(&format!("{at}head.attention.in_proj_{kind}"), 3 * width * columns)?;
        let kv = q.split_off(width * columns);
        let shape = |rows: usize| if kind == "weight" { vec![rows, width] } else { vec![rows] };
        c.put(format!("pool.q.{kind}"), &shape(width), q);
        c.put(format!("pool.kv.{kind}"), &shape(2 * width), kv);
    }
    c.linear(&format!("{at}head.attention.out_proj"), "pool.proj")?;
    c.norm(&format!("{at}head.layernorm"), "pool.norm_mlp")?;
    c.linear(&format!("{at}head.mlp.fc1"), "pool.mlp.fc1")?;
    c.linear(&format!("{at}head.mlp.fc2"), "pool.mlp.fc2")?;

    model.block = BlockKind::Serial;
    model.norm = NormKind::LayerNorm;
    (model.norm_eps, model.qk_norm_eps) = (1e-6, 1e-6);
    model.gelu = GeluKind::Tanh;
    model.attention_scale = 0.0;
    model.pool = PoolKind::Map;
    model.pool_residual = false;
    (model.class_token, model.registers) = (false, 0);
    c.finish(model)
}
