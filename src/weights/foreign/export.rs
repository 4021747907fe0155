//! Our weights under timm's names, and how timm is asked for the network.

use std::fmt::Write as _;

use super::axes::Sizes;
use super::convert::backwards;
use super::table::family;
use super::{PREFIX_POSITIONS, fold_prefix};
use crate::recipe::shapes::Dimensions;
use crate::recipe::{
    BlockKind, GeluKind, ModelConfig, NormKind, PoolKind, PositionBasis, PositionCombination, PositionConfig,
    PositionCoordinate, PositionResample, QkNormKind, Rope,
};
use crate::weights::Weights;
use crate::{Error, Result};

/// Weights for timm.
#[derive(Clone, Debug)]
pub struct Exported {
    /// The tensors; no metadata of ours.
    pub weights: Weights,
    /// The Python call that makes a network for them, and behind `#` what of the model it has no argument for.
    pub call: String,
}

/// Gives `weights` of `model` timm's names: those of `NaFlexVit` if `naflex`, else those of the class that `origin`, the
/// table they were read by, or their positions call for. What was read from such names becomes what it was, bit by bit.
///
/// # Errors
/// What timm's networks do not have: every setting by its key, tensors by their names.
pub fn to_timm(
    mut weights: Weights,
    model: &ModelConfig,
    origin: Option<&str>,
    naflex: bool,
) -> Result<Exported> {
    let key = if naflex { "timm-naflex" } else { class(model, origin) };
    let family = family(key)?;
    let dims = model.dimensions()?;
    let mut found = inexpressible(model, key);
    let classes = drop_identity(&mut weights, model, dims.width);
    if classes > 0 && !model.head_bias {
        found.push("model.head_bias = false".into());
    }
    if !found.is_empty() {
        return Err(Error::usage(format!("{} cannot express this model: {}", family.name, found.join(", "))));
    }
    if key == "timm-naflex" {
        fold_prefix(&mut weights)?;
    }
    if key == "timm-vit-parallel" && !model.proj_bias {
        drop_zeros(&mut weights)?;
    }
    let positions = pad_positions(&mut weights, model, dims.width)?;
    let sizes = sizes(model, &dims, positions, classes);
    weights.tensors = backwards(family, &weights, dims.depth, &sizes)?;
    weights.metadata = [("format".to_owned(), "pt".to_owned())].into();
    let mut call = call(model, key, &dims, positions, classes);
    call.extend(lost_filter(model, key));
    Ok(Exported { weights, call })
}

/// The table of timm's names for a model.
fn class(model: &ModelConfig, origin: Option<&str>) -> &'static str {
    let parallel = model.block == BlockKind::Parallel;
    let by_axes = model.position.combination == PositionCombination::Sum
        || model.position.coordinate == PositionCoordinate::FractionalAspect;
    match origin {
        Some("timm-vit-parallel") if parallel => "timm-vit-parallel",
        Some("timm-vit-parallel-fused") if parallel => "timm-vit-parallel-fused",
        // One projection has one bias for both branches, which is our MLP's.
        _ if parallel && !model.proj_bias => "timm-vit-parallel-fused",
        _ if parallel => "timm-vit-parallel",
        Some("timm-naflex" | "hf-siglip2-naflex" | "big-vision-naflex") => "timm-naflex",
        _ if by_axes || model.patch_norm_out => "timm-naflex",
        _ => "timm-vit",
    }
}

/// The settings that a class of timm has not, `key = value`.
fn inexpressible(model: &ModelConfig, key: &str) -> Vec<String> {
    // Without `..`: whoever adds a setting decides here whether timm has it.
    let ModelConfig {
        shape: _,
        width,
        depth: _,
        mlp: _,
        heads,
        kv_heads,
        head_dim: _,
        attention_scale,
        patch: _,
        channels: _,
        block,
        norm,
        norm_bias,
        norm_eps,
        patch_norm_in,
        patch_norm_out,
        final_norm,
        head_norm,
        qk_norm,
        qk_norm_per_head,
        qk_norm_eps,
        qkv_bias: _,
        proj_bias,
        mlp_bias,
        // Only the identity of a network without a classifier has none.
        head_bias: _,
        patch_bias,
        gelu: _,
        layer_scale: _,
        drop_path: _,
        drop_path_linear: _,
        class_token: _,
        registers: _,
        pool,
        pool_mlp,
        pool_qk_norm,
        pool_query_norm,
        pool_residual,
        // The filter matters on other grids than the table's alone: `lost_filter` tells it beside the call.
        position:
            PositionConfig { basis, coordinate, combination, rows: _, columns: _, resample: _, fourier_std: _ },
        rope,
        head_init_bias: _,
        recompute: _,
    } = model;
    let mut found = Vec::new();
    let mut refuse = |wrong: bool, key: &str, value: &dyn std::fmt::Debug| {
        if wrong {
            found.push(format!("model.{key} = {value:?}").to_lowercase());
        }
    };
    let (naflex, parallel, map) =
        (key == "timm-naflex", *block == BlockKind::Parallel, *pool == PoolKind::Map);
    let scale = model.dimensions().map_or(0.0, |dims| 1.0 / (dims.head_dim as f64).sqrt());
    refuse(
        *attention_scale != 0.0 && (attention_scale / scale - 1.0).abs() > 1e-6,
        "attention_scale",
        attention_scale,
    );
    let inner = model.dimensions().map_or(0, |dims| dims.heads * dims.head_dim);
    refuse(
        model.dimensions().is_ok_and(|dims| inner != dims.width),
        "heads × model.head_dim beside model.width",
        width,
    );
    refuse(parallel && naflex, "block", block);
    // timm has both, under other names and in other layouts.
    refuse(*kv_heads != 0 && kv_heads != heads, "kv_heads", kv_heads);
    refuse(rope.kind != Rope::None, "rope.kind", &rope.kind);
    refuse((*norm == NormKind::LayerNorm) != *norm_bias, "norm_bias", norm_bias);
    // NaFlexVit's embedding could, but no argument of the network reaches it.
    refuse(*patch_norm_in, "patch_norm_in", patch_norm_in);
    refuse(*patch_norm_out && !naflex, "patch_norm_out", patch_norm_out);
    let expected = match norm {
        NormKind::LayerNorm => QkNormKind::LayerNormBias,
        NormKind::Rms => QkNormKind::Rms,
    };
    let qk = *qk_norm != QkNormKind::None;
    refuse(qk && *qk_norm != expected, "qk_norm", qk_norm);
    refuse(qk && *qk_norm_per_head, "qk_norm_per_head", qk_norm_per_head);
    refuse(qk && qk_norm_eps != norm_eps, "qk_norm_eps unlike model.norm_eps", qk_norm_eps);
    // It has none beside a norm after the positions.
    refuse(!patch_bias, "patch_bias", patch_bias);
    refuse(parallel && !mlp_bias, "mlp_bias", mlp_bias);
    // One switch for both in timm's serial blocks.
    refuse(!parallel && proj_bias != mlp_bias, "proj_bias unlike model.mlp_bias", proj_bias);
    refuse(map && !pool_mlp, "pool_mlp", pool_mlp);
    refuse(map && *pool_query_norm, "pool_query_norm", pool_query_norm);
    refuse(map && *pool_residual, "pool_residual", pool_residual);
    refuse(map && *pool_qk_norm && qk, "pool_qk_norm", pool_qk_norm);
    let mean = *pool == PoolKind::Mean;
    refuse(!mean && !final_norm, "final_norm", final_norm);
    refuse(!mean && *head_norm, "head_norm", head_norm);
    refuse(mean && final_norm == head_norm, "final_norm beside model.head_norm", final_norm);
    refuse(!matches!(basis, PositionBasis::Learned | PositionBasis::None), "position.basis", basis);
    if *basis == PositionBasis::Learned {
        refuse(*coordinate == PositionCoordinate::Absolute, "position.coordinate", coordinate);
        refuse(
            *coordinate == PositionCoordinate::FractionalAspect && !naflex,
            "position.coordinate",
            coordinate,
        );
        let has =
            *combination == PositionCombination::Joint || naflex && *combination == PositionCombination::Sum;
        refuse(!has, "position.combination", combination);
    }
    found
}

/// timm gives positions to all prefix tokens or to none: zeros for those that have none. How many there are then.
///
/// # Errors
/// Positions of more tokens than there are, or of another width.
fn pad_positions(weights: &mut Weights, model: &ModelConfig, width: usize) -> Result<usize> {
    let Some((shape, positions)) = weights.tensors.get_mut(PREFIX_POSITIONS) else { return Ok(0) };
    let prefix = model.prefix();
    if shape.last() != Some(&width) || positions.len() > prefix * width {
        return Err(Error::usage(format!(
            "{PREFIX_POSITIONS} is {shape:?}, expected at most the {prefix} prefix tokens (model.class_token, \
             model.registers) of {width} values"
        )));
    }
    *shape = vec![prefix, width];
    positions.resize(prefix * width, 0.0);
    Ok(prefix)
}

/// Leaves out the zeros that stand for an absent bias of the MLP's output projection: two projections of parallel blocks
/// have biases both or neither.
///
/// # Errors
/// Biases that have become others since.
fn drop_zeros(weights: &mut Weights) -> Result<()> {
    let is_bias = |name: &str| name.ends_with(".mlp.fc2.bias");
    let trained = weights.tensors.iter().find(|(name, (_, v))| is_bias(name) && v.iter().any(|x| *x != 0.0));
    if let Some((name, _)) = trained {
        return Err(Error::usage(format!(
            "timm's parallel blocks have a bias in both output projections or in none, and model.proj_bias = false beside \
             {name}, which is not zero"
        )));
    }
    weights.tensors.retain(|name, _| !is_bias(name));
    Ok(())
}

/// Leaves out the identity that stands for no classifier. The number of classes, 0 without one.
fn drop_identity(weights: &mut Weights, model: &ModelConfig, width: usize) -> usize {
    let Some((shape, values)) = weights.tensors.get("head.weight") else { return 0 };
    let identity = shape[..] == [width, width]
        && values.iter().enumerate().all(|(i, v)| *v == if i % (width + 1) == 0 { 1.0 } else { 0.0 });
    let classes = shape.first().copied().unwrap_or(0);
    if identity && !model.head_bias {
        weights.tensors.remove("head.weight");
        return 0;
    }
    classes
}

fn sizes(model: &ModelConfig, dims: &Dimensions, positions: usize, classes: usize) -> Sizes {
    let mut sizes = Sizes::default();
    for (letter, size) in [
        ('d', dims.width),
        ('m', dims.mlp),
        ('e', dims.mlp),
        ('h', dims.heads),
        ('k', dims.head_dim),
        ('i', dims.heads * dims.head_dim),
        ('j', dims.kv_heads * dims.head_dim),
        ('c', model.channels),
        ('p', model.patch),
        ('y', model.position.rows),
        ('x', model.position.columns),
        ('z', usize::from(model.class_token)),
        ('r', model.registers),
        ('t', positions),
        ('o', classes),
    ] {
        sizes.set(letter, size);
    }
    sizes
}

/// The filter of the positions where the class resamples by another, as a comment behind the call.
fn lost_filter(model: &ModelConfig, key: &str) -> Option<String> {
    let PositionConfig { basis, combination, rows, columns, resample, .. } = &model.position;
    let (has, own) = match (combination, key) {
        (PositionCombination::Sum, _) => (*resample == PositionResample::Linear, PositionResample::Linear),
        (_, "timm-naflex") => {
            (*resample != PositionResample::BicubicOffset, PositionResample::BicubicNoAntialias)
        }
        _ => (*resample == PositionResample::Bicubic, PositionResample::Bicubic),
    };
    (*basis == PositionBasis::Learned && !has).then(|| {
        format!(
            "  # the same on grids of {rows}x{columns}; timm resamples to others by the filter {}, not by \
             model.position.resample = {}",
            quoted(own),
            quoted(*resample)
        )
    })
}

/// As recipes name it.
fn quoted(resample: PositionResample) -> String {
    serde_json::to_string(&resample).unwrap_or_default()
}

/// timm's `mlp_ratio`, of which it takes `int(width * mlp_ratio)`.
fn mlp_ratio(mlp: usize, width: usize) -> f64 {
    let exact = mlp as f64 / width as f64;
    if (exact * width as f64) as usize == mlp { exact } else { (mlp as f64 + 0.5) / width as f64 }
}

/// The call of the class, as one line of Python.
fn call(model: &ModelConfig, key: &str, dims: &Dimensions, positions: usize, classes: usize) -> String {
    let naflex = key == "timm-naflex";
    let python = |value: bool| if value { "True" } else { "False" };
    let (rows, columns) = (model.position.rows, model.position.columns);
    let pool = match model.pool {
        PoolKind::Map => "map",
        PoolKind::Mean => "avg",
        PoolKind::Cls => "token",
    };
    let mut args = format!(
        "patch_size={}, embed_dim={}, depth={}, num_heads={}, mlp_ratio={}, qkv_bias={}, class_token={}, \
         reg_tokens={}, global_pool='{pool}'",
        model.patch,
        dims.width,
        dims.depth,
        dims.heads,
        mlp_ratio(dims.mlp, dims.width),
        python(model.qkv_bias),
        python(model.class_token),
        model.registers,
    );
    let mut arg = |wanted: bool, text: String| {
        if wanted {
            let _ = write!(args, ", {text}");
        }
    };
    arg(model.pool == PoolKind::Mean, format!("fc_norm={}", python(model.head_norm)));
    arg(model.layer_scale > 0.0, "init_values=1e-5".into());
    arg(model.qk_norm != QkNormKind::None, "qk_norm=True".into());
    arg(!model.proj_bias && key != "timm-vit-parallel-fused", "proj_bias=False".into());
    let rms = model.norm == NormKind::Rms;
    let layer = if rms { "timm.layers.RmsNorm" } else { "timm.layers.LayerNorm" };
    let tanh = model.gelu == GeluKind::Tanh;
    if naflex {
        arg(rms || model.norm_eps != 1e-6, format!("norm_layer=partial({layer}, eps={:e})", model.norm_eps));
        arg(tanh, "act_layer='gelu_tanh'".into());
        arg(model.position.basis == PositionBasis::None, "pos_embed='none'".into());
        arg(model.position.combination == PositionCombination::Sum, "pos_embed='factorized'".into());
        let aspect = model.position.coordinate == PositionCoordinate::FractionalAspect;
        arg(aspect, "pos_embed_ar_preserving=True".into());
        arg(true, format!("pos_embed_grid_size=({rows}, {columns})"));
        let norm = format!("embed_norm_layer=partial({layer}, eps={:e})", model.norm_eps);
        arg(model.patch_norm_out, norm);
        // Tables of one axis have the linear filter and no choice.
        if model.position.combination == PositionCombination::Joint {
            use PositionResample::{Bicubic, Bilinear, Linear, LinearAlignCorners};
            let filter = model.position.resample;
            let linear = matches!(filter, Bilinear | Linear | LinearAlignCorners);
            arg(linear, "pos_embed_interp_mode='bilinear'".into());
            arg(!matches!(filter, Bicubic | Bilinear), "pos_embed_antialias=False".into());
            arg(filter == LinearAlignCorners, "pos_embed_align_corners=True".into());
        }
        let channels = model.channels;
        return format!(
            "timm.models.NaFlexVit(timm.models.NaFlexVitCfg({args}), in_chans={channels}, num_classes={classes})"
        );
    }
    arg(rms || model.norm_eps != 1e-6, format!("norm_layer=partial({layer}, eps={:e})", model.norm_eps));
    arg(tanh, "act_layer='gelu_tanh'".into());
    arg(model.position.basis == PositionBasis::None, "pos_embed='none'".into());
    arg(positions == 0, "no_embed_class=True".into());
    arg(true, format!("img_size=({}, {})", rows * model.patch, columns * model.patch));
    let block = "timm.models.vision_transformer.ParallelScalingBlock";
    match key {
        "timm-vit-parallel" => arg(true, format!("block_fn={block}")),
        "timm-vit-parallel-fused" => arg(true, format!("block_fn=partial({block}, fuse_out_proj=True)")),
        _ => {}
    }
    arg(true, format!("in_chans={}, dynamic_img_size=True", model.channels));
    format!("timm.models.VisionTransformer({args}, num_classes={classes})")
}

#[cfg(test)]
mod tests {
    use super::mlp_ratio;

    #[test]
    fn timm_takes_the_width_of_the_mlp_from_the_ratio() {
        let mut rounded = 0;
        for width in 1..200 {
            for mlp in 1..5 * width {
                rounded += usize::from((mlp as f64 / width as f64 * width as f64) as usize != mlp);
                assert_eq!((mlp_ratio(mlp, width) * width as f64) as usize, mlp, "{mlp} / {width}");
            }
        }
        assert!(rounded > 0);
        assert_eq!(mlp_ratio(4304, 1152), 4304.0 / 1152.0);
    }
}
