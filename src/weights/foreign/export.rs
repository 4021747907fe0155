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
    /// The Python call that makes a network for them.
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
    let positions = pad_positions(&mut weights, model, dims.width);
    let sizes = sizes(model, &dims, positions, classes);
    weights.tensors = backwards(family, &weights, dims.depth, &sizes)?;
    weights.metadata = [("format".to_owned(), "pt".to_owned())].into();
    let call = call(model, key, &dims, positions, classes);
    Ok(Exported { weights, call })
}

/// The table of timm's names for a model.
fn class(model: &ModelConfig, origin: Option<&str>) -> &'static str {
    let parallel = model.block == BlockKind::Parallel;
    let by_axes = model.position.combination == PositionCombination::Sum
        || model.position.coordinate == PositionCoordinate::FractionalAspect;
    match origin {
        _ if parallel && model.mlp_bias && !model.proj_bias => "timm-vit-parallel-fused",
        _ if parallel => "timm-vit-parallel",
        Some("timm-naflex" | "hf-siglip2-naflex" | "big-vision-naflex") => "timm-naflex",
        _ if by_axes || model.patch_norm_in || model.patch_norm_out => "timm-naflex",
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
        norm_eps: _,
        patch_norm_in,
        patch_norm_out,
        final_norm,
        head_norm,
        qk_norm,
        qk_norm_per_head,
        qk_norm_eps: _,
        qkv_bias: _,
        proj_bias,
        mlp_bias,
        // Only the identity of a network without a classifier has none.
        head_bias: _,
        patch_bias: _,
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
        position: PositionConfig { basis, coordinate, combination, .. },
        rope,
        head_init_bias: _,
        checkpoint: _,
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
    refuse(*patch_norm_in && !naflex, "patch_norm_in", patch_norm_in);
    refuse(*patch_norm_out && !naflex, "patch_norm_out", patch_norm_out);
    let expected = match norm {
        NormKind::LayerNorm => QkNormKind::LayerNormBias,
        NormKind::Rms => QkNormKind::Rms,
    };
    let qk = *qk_norm != QkNormKind::None;
    refuse(qk && *qk_norm != expected, "qk_norm", qk_norm);
    refuse(qk && *qk_norm_per_head, "qk_norm_per_head", qk_norm_per_head);
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
fn pad_positions(weights: &mut Weights, model: &ModelConfig, width: usize) -> usize {
    let Some((shape, positions)) = weights.tensors.get_mut(PREFIX_POSITIONS) else { return 0 };
    *shape = vec![model.prefix(), width];
    positions.resize(model.prefix() * width, 0.0);
    model.prefix()
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

/// The call of the class, as one line of Python.
fn call(model: &ModelConfig, key: &str, dims: &Dimensions, positions: usize, classes: usize) -> String {
    let (naflex, parallel) = (key == "timm-naflex", model.block == BlockKind::Parallel);
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
        dims.mlp as f64 / dims.width as f64,
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
    arg(!model.proj_bias && !parallel, "proj_bias=False".into());
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
        let bilinear = model.position.resample == PositionResample::Bilinear;
        arg(bilinear, "pos_embed_interp_mode='bilinear'".into());
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
