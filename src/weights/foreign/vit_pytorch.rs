//! vit-pytorch 1.x: `na_vit.NaViT` and `na_vit_nested_tensor.NaViT`.
//!
//! Both normalise patches before and after the embedding, add absolute row and column positions,
//! and pool with one learned query. `na_vit` scales scores by 1 (its QK-norm carries √head_dim)
//! and adds the query to the pooled vector; the nested form does neither.

use super::Weights;
use super::conversion::Conversion;
use crate::Result;
use crate::recipe::{
    BlockKind, GeluKind, ModelConfig, NormKind, PoolKind, PositionBasis, PositionCombination,
    PositionCoordinate, QkNormKind,
};

/// `na_vit.NaViT`.
pub(super) fn packed(mut c: Conversion, model: &mut ModelConfig) -> Result<Weights> {
    let [heads, _, head_dim] = c.shape("transformer.layers.0.0.q_norm.gamma")?;
    let depth = depth(&c, "to_q.weight");
    (model.heads, model.head_dim) = (heads, head_dim);
    common(&mut c, model)?;

    let attention = |c: &mut Conversion, from: &str, to: &str, fused: bool| -> Result<()> {
        for norm in ["q_norm", "k_norm"] {
            let values = c.take_len(&format!("{from}.{norm}.gamma"), heads * head_dim)?;
            c.put(format!("{to}.{norm}.gain"), &[heads * head_dim], values);
        }
        if fused {
            let parts = [format!("{from}.to_q"), format!("{from}.to_kv")];
            c.join_linear(&parts, &format!("{to}.qkv"))?;
        } else {
            c.linear(&format!("{from}.to_q"), &format!("{to}.q"))?;
            c.linear(&format!("{from}.to_kv"), &format!("{to}.kv"))?;
        }
        c.linear(&format!("{from}.to_out.0"), &format!("{to}.proj"))
    };
    let norm = |c: &mut Conversion, from: &str, to: &str| -> Result<()> {
        let gamma = format!("{from}.gamma");
        let [width] = c.shape(&gamma)?;
        c.rename(&gamma, &format!("{to}.gain"))?;
        // A buffer that the class never changes; released weights may hold it.
        let beta = format!("{from}.beta");
        if c.has(&beta) && c.take_len(&beta, width)?.iter().any(|v| *v != 0.0) {
            return Err(c.error(format_args!("{beta} is not zero, which the class cannot have produced")));
        }
        Ok(())
    };
    norm(&mut c, "to_patch_embedding.0", "patch_embed.norm_in")?;
    norm(&mut c, "to_patch_embedding.2", "patch_embed.norm_out")?;
    for n in 0..depth {
        let (from, to) = (format!("transformer.layers.{n}"), format!("blocks.{n}"));
        norm(&mut c, &format!("{from}.0.norm"), &format!("{to}.norm1"))?;
        attention(&mut c, &format!("{from}.0"), &format!("{to}.attn"), true)?;
        norm(&mut c, &format!("{from}.1.0"), &format!("{to}.norm2"))?;
        c.linear(&format!("{from}.1.1"), &format!("{to}.mlp.fc1"))?;
        c.linear(&format!("{from}.1.4"), &format!("{to}.mlp.fc2"))?;
    }
    norm(&mut c, "transformer.norm", "norm")?;
    norm(&mut c, "attn_pool.norm", "pool.norm")?;
    attention(&mut c, "attn_pool", "pool", false)?;
    norm(&mut c, "mlp_head.0", "head_norm")?;

    model.qk_norm = QkNormKind::Rms;
    // `F.normalize` divides by max(‖x‖, 1e-12); ‖x‖² is head_dim times the mean square.
    model.qk_norm_eps = 1e-24 / head_dim as f64;
    model.attention_scale = 1.0;
    model.pool_residual = true;
    c.finish(model)
}

/// `na_vit_nested_tensor.NaViT`.
pub(super) fn nested(mut c: Conversion, model: &mut ModelConfig) -> Result<Weights> {
    let depth = depth(&c, "to_queries.weight");
    let [inner, _] = c.shape("transformer.layers.0.0.to_queries.weight")?;
    if !c.has("transformer.layers.0.0.query_norm.weight") {
        return Err(c.error(
            "a network built with qk_rmsnorm=False, which still normalises in its pooling, is not supported",
        ));
    }
    let [head_dim] = c.shape("transformer.layers.0.0.query_norm.weight")?;
    c.heads(model, inner, Some(head_dim))?;
    common(&mut c, model)?;

    let attention = |c: &mut Conversion, from: &str, to: &str, fused: bool| -> Result<()> {
        let [q, k, v] = ["queries", "keys", "values"].map(|part| format!("{from}.to_{part}"));
        if fused {
            c.join_linear(&[q, k, v], &format!("{to}.qkv"))?;
        } else {
            c.linear(&q, &format!("{to}.q"))?;
            c.join_linear(&[k, v], &format!("{to}.kv"))?;
        }
        c.norm(&format!("{from}.query_norm"), &format!("{to}.q_norm"))?;
        c.norm(&format!("{from}.key_norm"), &format!("{to}.k_norm"))?;
        c.linear(&format!("{from}.to_out"), &format!("{to}.proj"))
    };
    c.norm("to_patch_embedding.0", "patch_embed.norm_in")?;
    c.norm("to_patch_embedding.2", "patch_embed.norm_out")?;
    for n in 0..depth {
        let (from, to) = (format!("transformer.layers.{n}"), format!("blocks.{n}"));
        c.norm(&format!("{from}.0.norm"), &format!("{to}.norm1"))?;
        attention(&mut c, &format!("{from}.0"), &format!("{to}.attn"), true)?;
        c.norm(&format!("{from}.1.0"), &format!("{to}.norm2"))?;
        c.linear(&format!("{from}.1.1"), &format!("{to}.mlp.fc1"))?;
        c.linear(&format!("{from}.1.4"), &format!("{to}.mlp.fc2"))?;
    }
    c.norm("transformer.norm", "norm")?;
    c.norm("attn_pool.norm", "pool.norm")?;
    attention(&mut c, "attn_pool", "pool", false)?;
    c.norm("mlp_head.0", "head_norm")?;

    model.qk_norm = QkNormKind::LayerNorm;
    model.qk_norm_eps = 1e-5;
    model.attention_scale = 0.0;
    model.pool_residual = false;
    c.finish(model)
}

fn depth(c: &Conversion, leaf: &str) -> usize {
    (0..).take_while(|n| c.has(&format!("transformer.layers.{n}.0.{leaf}"))).count()
}

/// What both forms share: patch embedding, positions, query, head, and the fixed choices.
fn common(c: &mut Conversion, model: &mut ModelConfig) -> Result<()> {
    let [width, patch_len] = c.shape("to_patch_embedding.1.weight")?;
    set_patch(c, model, patch_len)?;
    c.linear("to_patch_embedding.1", "patch_embed")?;
    let [rows, _] = c.shape("pos_embed_height")?;
    let [columns, _] = c.shape("pos_embed_width")?;
    c.rename("pos_embed_height", "position.row")?;
    c.rename("pos_embed_width", "position.column")?;
    let query = c.take_len("attn_pool_queries", width)?;
    c.put("pool.query", &[1, width], query);
    c.linear("mlp_head.1", "head")?;

    model.block = BlockKind::Serial;
    model.norm = NormKind::LayerNorm;
    model.norm_eps = 1e-5;
    model.gelu = GeluKind::Erf;
    model.pool = PoolKind::Map;
    (model.class_token, model.registers) = (false, 0);
    model.position.basis = PositionBasis::Learned;
    model.position.coordinate = PositionCoordinate::Absolute;
    model.position.combination = PositionCombination::Sum;
    (model.position.rows, model.position.columns) = (rows, columns);
    Ok(())
}

/// Patch side and channels from the length of a flattened patch; the configured channels go first.
pub(super) fn set_patch(c: &Conversion, model: &mut ModelConfig, patch_len: usize) -> Result<()> {
    for channels in [model.channels, 3, 1] {
        let side = (patch_len / channels.max(1)).isqrt();
        if channels * side * side == patch_len {
            (model.patch, model.channels) = (side, channels);
            return Ok(());
        }
    }
    Err(c.error(format_args!("a flattened patch of {patch_len} values is no square of 3 channels or 1")))
}
