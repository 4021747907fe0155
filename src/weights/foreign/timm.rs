//! timm 1.x: `NaFlexVit` and `VisionTransformer`, with the names of DeiT's own repository
//! (`gamma_1`) and the parallel blocks of ViT-22B (`ParallelScalingBlock`).
//!
//! Not in the files: head count (unless there is QK-norm), kind of GELU, resampling filter and
//! aspect handling of positions, epsilons. They come from the configuration.

use super::Weights;
use super::conversion::Conversion;
use super::vit_pytorch::set_patch;
use crate::Result;
use crate::recipe::{
    BlockKind, ModelConfig, NormKind, PoolKind, PositionBasis, PositionCombination, PositionCoordinate,
    PositionResample, QkNormKind,
};

/// `NaFlexVit`: linear patch embedding over (row, column, channel), positions added to patches alone.
pub(super) fn naflex(mut c: Conversion, model: &mut ModelConfig) -> Result<Weights> {
    let prefix = tokens(&mut c, model, "embeds.")?;
    patch_linear(&mut c, model, "embeds.proj")?;
    c.optional_norm("embeds.norm_input", "patch_embed.norm_in")?;
    c.optional_norm("embeds.norm", "patch_embed.norm_out")?;
    if c.has("embeds.pos_embed_y") {
        for (from, to) in [("embeds.pos_embed_y", "position.row"), ("embeds.pos_embed_x", "position.column")]
        {
            let [_, rows, width] = c.shape(from)?;
            let values = c.take_len(from, rows * width)?;
            c.put(to, &[rows, width], values);
            if to == "position.row" {
                model.position.rows = rows;
            } else {
                model.position.columns = rows;
            }
        }
        learned(model, PositionCombination::Sum);
        model.position.resample = PositionResample::Linear;
    } else if c.has("embeds.pos_embed") {
        let [_, rows, columns, width] = c.shape("embeds.pos_embed")?;
        let values = c.take_len("embeds.pos_embed", rows * columns * width)?;
        table(&mut c, model, (rows, columns), width, values);
    } else {
        model.position.basis = PositionBasis::None;
    }
    put_prefix(&mut c, model, prefix);
    body(c, model)
}

/// `VisionTransformer`: strided convolution, one table over a square grid, perhaps with rows for
/// the prefix tokens in front.
pub(super) fn plain(mut c: Conversion, model: &mut ModelConfig) -> Result<Weights> {
    let mut prefix = tokens(&mut c, model, "")?;
    let [width, channels, patch, _] = c.shape("patch_embed.proj.weight")?;
    let kernel = c.take_len("patch_embed.proj.weight", width * channels * patch * patch)?;
    c.put("patch_embed.weight", &[width, channels * patch * patch], kernel);
    c.optional("patch_embed.proj.bias", "patch_embed.bias")?;
    (model.patch, model.channels) = (patch, channels);
    if c.has("pos_embed") {
        let [_, rows, _] = c.shape("pos_embed")?;
        let mut values = c.take_len("pos_embed", rows * width)?;
        let own = prefix.len() / width;
        let configured = (model.position.rows, model.position.columns);
        let grid = |count: usize| {
            let side = count.isqrt();
            if configured.0 * configured.1 == count {
                Some(configured)
            } else {
                (count > 0 && side * side == count).then_some((side, side))
            }
        };
        let grid = match (grid(rows), rows.checked_sub(own).and_then(grid)) {
            (Some(grid), _) => grid,
            (None, Some(grid)) => {
                for (token, position) in prefix.iter_mut().zip(values.drain(..own * width)) {
                    *token += position;
                }
                grid
            }
            (None, None) => {
                return Err(c.error(format_args!(
                    "pos_embed has {rows} rows, which is no square grid, with {own} prefix tokens or without; set \
                     model.position.rows and model.position.columns"
                )));
            }
        };
        table(&mut c, model, grid, width, values);
    } else {
        model.position.basis = PositionBasis::None;
    }
    put_prefix(&mut c, model, prefix);
    body(c, model)
}

/// The cls token and the registers, one after another.
fn tokens(c: &mut Conversion, model: &mut ModelConfig, at: &str) -> Result<Vec<f32>> {
    let (cls, registers) = (format!("{at}cls_token"), format!("{at}reg_token"));
    let mut prefix = Vec::new();
    model.class_token = c.has(&cls);
    if model.class_token {
        prefix = c.take(&cls)?.1;
    }
    model.registers = 0;
    if c.has(&registers) {
        let [_, count, _] = c.shape(&registers)?;
        model.registers = count;
        prefix.extend(c.take(&registers)?.1);
    }
    Ok(prefix)
}

fn put_prefix(c: &mut Conversion, model: &ModelConfig, prefix: Vec<f32>) {
    let count = usize::from(model.class_token) + model.registers;
    if let Some(width) = prefix.len().checked_div(count) {
        c.put("prefix", &[count, width], prefix);
    }
}

/// A linear patch embedding whose columns run over (row, column, channel): reordered to (channel,
/// row, column).
pub(super) fn patch_linear(c: &mut Conversion, model: &mut ModelConfig, from: &str) -> Result<()> {
    let weight = format!("{from}.weight");
    let [width, patch_len] = c.shape(&weight)?;
    set_patch(c, model, patch_len)?;
    let (channels, pixels) = (model.channels, model.patch * model.patch);
    let given = c.take_len(&weight, width * patch_len)?;
    let mut values = Vec::with_capacity(given.len());
    for row in given.chunks_exact(patch_len) {
        for channel in 0..channels {
            values.extend((0..pixels).map(|pixel| row[pixel * channels + channel]));
        }
    }
    c.put("patch_embed.weight", &[width, patch_len], values);
    c.optional(&format!("{from}.bias"), "patch_embed.bias")
}

/// A learned table over (row, column), resized to each image's grid.
pub(super) fn table(
    c: &mut Conversion,
    model: &mut ModelConfig,
    grid: (usize, usize),
    width: usize,
    values: Vec<f32>,
) {
    c.put("position.table", &[grid.0 * grid.1, width], values);
    learned(model, PositionCombination::Joint);
    (model.position.rows, model.position.columns) = grid;
    if model.position.resample == PositionResample::Linear {
        model.position.resample = PositionResample::Bicubic;
    }
}

fn learned(model: &mut ModelConfig, combination: PositionCombination) {
    model.position.basis = PositionBasis::Learned;
    model.position.combination = combination;
    if model.position.coordinate == PositionCoordinate::Absolute {
        model.position.coordinate = PositionCoordinate::Fractional;
    }
}

/// Blocks, norms, pooling and head, which both classes name alike.
fn body(mut c: Conversion, model: &mut ModelConfig) -> Result<Weights> {
    let parallel = c.has("blocks.0.in_proj.weight");
    model.block = if parallel { BlockKind::Parallel } else { BlockKind::Serial };
    let (first_norm, q_norm) = if parallel { ("in_norm", "q_norm") } else { ("norm1", "attn.q_norm") };
    // timm's only norm without bias is its RmsNorm.
    let rms = !c.has(&format!("blocks.0.{first_norm}.bias"));
    model.norm = if rms { NormKind::Rms } else { NormKind::LayerNorm };
    let [width] = c.shape(&format!("blocks.0.{first_norm}.weight"))?;
    let q_norm = format!("blocks.0.{q_norm}.weight");
    let head_dim = match c.has(&q_norm) {
        true => Some(c.shape::<1>(&q_norm)?[0]),
        false => None,
    };
    c.heads(model, width, head_dim)?;
    if head_dim.is_some() {
        model.qk_norm = if rms { QkNormKind::Rms } else { QkNormKind::LayerNormBias };
    }
    model.attention_scale = 0.0;
    let depth = (0..).take_while(|n| c.has(&format!("blocks.{n}.{first_norm}.weight"))).count();
    for n in 0..depth {
        let block = format!("blocks.{n}");
        if parallel { parallel_block(&mut c, &block, width)? } else { serial_block(&mut c, &block)? }
    }
    c.optional_norm("norm", "norm")?;
    let head_norm = c.optional_norm("fc_norm", "head_norm")?;
    if c.has("attn_pool.latent") {
        model.pool = PoolKind::Map;
        model.pool_residual = false;
        let latent = c.take_len("attn_pool.latent", width)?;
        c.put("pool.query", &[1, width], latent);
        for part in ["q", "kv", "proj", "mlp.fc1", "mlp.fc2"] {
            c.linear(&format!("attn_pool.{part}"), &format!("pool.{part}"))?;
        }
        c.optional_norm("attn_pool.q_norm", "pool.q_norm")?;
        c.optional_norm("attn_pool.k_norm", "pool.k_norm")?;
        c.norm("attn_pool.norm", "pool.norm_mlp")?;
    } else if model.pool != PoolKind::Mean {
        let cls = model.class_token && !head_norm;
        model.pool = if cls { PoolKind::Cls } else { PoolKind::Mean };
    }
    if c.has("head.weight") {
        c.linear("head", "head")?;
    }
    c.finish(model)
}

fn serial_block(c: &mut Conversion, block: &str) -> Result<()> {
    for norm in ["norm1", "norm2"] {
        c.norm(&format!("{block}.{norm}"), &format!("{block}.{norm}"))?;
    }
    for norm in ["attn.q_norm", "attn.k_norm"] {
        c.optional_norm(&format!("{block}.{norm}"), &format!("{block}.{norm}"))?;
    }
    for linear in ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"] {
        c.linear(&format!("{block}.{linear}"), &format!("{block}.{linear}"))?;
    }
    for n in 1..=2 {
        c.optional(&format!("{block}.ls{n}.gamma"), &format!("{block}.scale{n}"))?;
        c.optional(&format!("{block}.gamma_{n}"), &format!("{block}.scale{n}"))?;
    }
    Ok(())
}

/// `ParallelScalingBlock`: one input projection with rows `[mlp | q | k | v]`, one LayerScale for the sum
/// of both branches.
fn parallel_block(c: &mut Conversion, block: &str, width: usize) -> Result<()> {
    c.norm(&format!("{block}.in_norm"), &format!("{block}.norm1"))?;
    for norm in ["q_norm", "k_norm"] {
        c.optional_norm(&format!("{block}.{norm}"), &format!("{block}.attn.{norm}"))?;
    }
    let [rows, columns] = c.shape(&format!("{block}.in_proj.weight"))?;
    let mlp = rows.checked_sub(3 * width).filter(|mlp| *mlp > 0).ok_or_else(|| {
        c.error(format_args!("{block}.in_proj.weight has {rows} rows, expected more than 3 times {width}"))
    })?;
    let mut fc1 = c.take_len(&format!("{block}.in_proj.weight"), rows * columns)?;
    let qkv = fc1.split_off(mlp * columns);
    c.put(format!("{block}.mlp.fc1.weight"), &[mlp, columns], fc1);
    c.put(format!("{block}.attn.qkv.weight"), &[3 * width, columns], qkv);
    let bias = format!("{block}.in_proj.bias");
    if c.has(&bias) {
        let mut fc1 = c.take_len(&bias, rows)?;
        let qkv = fc1.split_off(mlp);
        c.put(format!("{block}.mlp.fc1.bias"), &[mlp], fc1);
        c.put(format!("{block}.attn.qkv.bias"), &[3 * width], qkv);
    }
    c.optional(&format!("{block}.mlp_bias"), &format!("{block}.mlp.fc1.bias"))?;
    if c.has(&format!("{block}.out_proj.weight")) {
        let both = c.take_len(&format!("{block}.out_proj.weight"), width * (width + mlp))?;
        let rows = || both.chunks_exact(width + mlp);
        let attn = rows().flat_map(|row| row[..width].iter().copied()).collect();
        let fc2 = rows().flat_map(|row| row[width..].iter().copied()).collect();
        c.put(format!("{block}.attn.proj.weight"), &[width, width], attn);
        c.put(format!("{block}.mlp.fc2.weight"), &[width, mlp], fc2);
        c.optional(&format!("{block}.out_proj.bias"), &format!("{block}.mlp.fc2.bias"))?;
    } else {
        c.linear(&format!("{block}.attn_out_proj"), &format!("{block}.attn.proj"))?;
        c.linear(&format!("{block}.mlp_out_proj"), &format!("{block}.mlp.fc2"))?;
    }
    let scale = format!("{block}.ls.gamma");
    if c.has(&scale) {
        let gamma = c.take_len(&scale, width)?;
        c.put(format!("{block}.scale1"), &[width], gamma.clone());
        c.put(format!("{block}.scale2"), &[width], gamma);
    }
    Ok(())
}
