//! The model that converted tensors are the weights of.

use super::arch::hint;
use super::axes::Sizes;
use super::reading::error;
use super::table::Family;
use crate::Result;
use crate::recipe::{
    ModelConfig, NormKind, PoolKind, PositionBasis, PositionCombination, PositionCoordinate,
    PositionResample, QkNormKind, Recipe,
};
use crate::weights::Weights;

/// Side in pixels of the images of a network whose grid nothing tells.
const USUAL_SIDE: usize = 224;
/// Most places of a table of sines and cosines: images of 16,384 pixels a side in patches of 16.
const MAX_PLACES: usize = 1 << 20;

/// Sets in `model` what tensors and family determine. A network without a classifier gets the identity as one, and
/// biases that only some modules of a kind have become zeros in the others.
///
/// # Errors
/// A head count that must be given; parts that this crate's model has only alike.
pub(super) fn describe(
    family: &Family,
    weights: &mut Weights,
    sizes: &Sizes,
    depth: usize,
    model: &mut ModelConfig,
) -> Result<()> {
    let size = |letter, what: &str| {
        sizes.get(letter).ok_or_else(|| error(family, format_args!("the tensors do not tell {what}")))
    };
    let (width, inner, mlp) =
        (size('d', "the width")?, size('i', "the heads' width")?, size('m', "the MLP's width")?);
    set_heads(family, sizes, [inner, depth], model)?;
    (model.width, model.depth, model.mlp) = (width, depth, mlp);
    model.shape.clear();
    (model.patch, model.channels) = (size('p', "the patch")?, size('c', "the channels")?);
    if let Some(pool) = sizes.get('e')
        && pool != mlp
    {
        return Err(error(
            family,
            format_args!(
                "the pooling head's MLP is {pool} wide and the blocks' is {mlp}; only equal widths are supported"
            ),
        ));
    }
    if model.position.rows == 0 || model.position.columns == 0 {
        let side = (USUAL_SIDE / model.patch.max(1)).max(1);
        (model.position.rows, model.position.columns) = (side, side);
    }
    let mut tensors = Tensors(weights);
    (model.class_token, model.registers) = (sizes.get('z').unwrap_or(0) > 0, sizes.get('r').unwrap_or(0));
    describe_norms(&mut tensors, model);
    model.qkv_bias = tensors
        .equalise(|n| n.ends_with(".attn.qkv.weight") || n == "pool.q.weight" || n == "pool.kv.weight");
    model.proj_bias = tensors.equalise(|n| n.ends_with(".attn.proj.weight") || n == "pool.proj.weight");
    model.mlp_bias = tensors.equalise(|n| n.ends_with("fc1.weight") || n.ends_with("fc2.weight"));
    model.patch_bias = tensors.has("patch_embed.bias");
    model.layer_scale = match (tensors.has("blocks.0.scale1"), model.layer_scale) {
        (false, _) => 0.0,
        // Any value but 0 switches LayerScale on; the weights replace it.
        (true, given) if given > 0.0 => given,
        (true, _) => 1e-5,
    };
    model.pool_mlp = tensors.has("pool.mlp.fc1.weight");
    model.pool_qk_norm = tensors.has("pool.q_norm.gain");
    model.pool_query_norm = tensors.has("pool.norm.gain");
    if tensors.has("pool.query") {
        model.pool = PoolKind::Map;
    } else if model.pool != PoolKind::Mean {
        let cls = model.class_token && !model.head_norm;
        model.pool = if cls { PoolKind::Cls } else { PoolKind::Mean };
    }
    if family.sincos && !tensors.has("position.table") {
        let (rows, columns) = (model.position.rows, model.position.columns);
        if !width.is_multiple_of(4) || width < 8 {
            return Err(error(
                family,
                format_args!("sines and cosines need a width that 4 divides, not {width}"),
            ));
        }
        if rows.checked_mul(columns).is_none_or(|places| places > MAX_PLACES) {
            return Err(error(
                family,
                format_args!(
                    "model.position.rows = {rows} times model.position.columns = {columns} must be at most {MAX_PLACES} \
                     places for a table of sines and cosines; lower them"
                ),
            ));
        }
        tensors
            .0
            .tensors
            .insert("position.table".into(), (vec![rows * columns, width], sincos(rows, columns, width)));
        model.position.basis = PositionBasis::Learned;
        model.position.combination = PositionCombination::Joint;
        model.position.coordinate = PositionCoordinate::Absolute;
    } else {
        describe_positions(&tensors, sizes, model);
    }
    if !tensors.has("head.weight") {
        // The identity, so that its logits are its features.
        let identity = (0..width * width).map(|i| if i % (width + 1) == 0 { 1.0 } else { 0.0 }).collect();
        tensors.0.tensors.insert("head.weight".into(), (vec![width, width], identity));
    }
    model.head_bias = tensors.has("head.bias");
    let told = Recipe { model: model.clone(), ..Recipe::default() }.with_sets(&family.set)?;
    *model = told.model;
    Ok(())
}

fn describe_norms(tensors: &mut Tensors, model: &mut ModelConfig) {
    let is_qk = |name: &str| name.ends_with("q_norm.gain") || name.ends_with("k_norm.gain");
    model.norm_bias = tensors.equalise(|name| name.ends_with(".gain") && !is_qk(name));
    // timm's only norm without bias is its RmsNorm; the tables of others say what theirs is.
    model.norm = if model.norm_bias { NormKind::LayerNorm } else { NormKind::Rms };
    model.patch_norm_in = tensors.has("patch_embed.norm_in.gain");
    model.patch_norm_out = tensors.has("patch_embed.norm_out.gain");
    model.final_norm = tensors.has("norm.gain");
    model.head_norm = tensors.has("head_norm.gain");
    model.qk_norm = match (tensors.len("blocks.0.attn.q_norm.gain"), tensors.has("blocks.0.attn.q_norm.bias"))
    {
        (None, _) => QkNormKind::None,
        (Some(_), true) => QkNormKind::LayerNormBias,
        (Some(_), false) => QkNormKind::Rms,
    };
    if let Some(gains) = tensors.len("blocks.0.attn.q_norm.gain") {
        model.qk_norm_per_head = gains != model.head_dim;
    }
}

fn describe_positions(tensors: &Tensors, sizes: &Sizes, model: &mut ModelConfig) {
    let joint = tensors.has("position.table");
    if !joint && !tensors.has("position.row") {
        model.position.basis = PositionBasis::None;
        return;
    }
    let position = &mut model.position;
    position.basis = PositionBasis::Learned;
    position.combination = if joint { PositionCombination::Joint } else { PositionCombination::Sum };
    if position.coordinate == PositionCoordinate::Absolute {
        position.coordinate = PositionCoordinate::Fractional;
    }
    // Tables of two dimensions are not resampled by the filter of one axis, unless asked for by its name.
    position.resample = match (joint, position.resample) {
        (true, PositionResample::Linear) => PositionResample::Bicubic,
        (true, given) => given,
        (false, _) => PositionResample::Linear,
    };
    position.rows = sizes.get('y').unwrap_or(position.rows);
    position.columns = sizes.get('x').unwrap_or(position.columns);
}

/// The head count from the norms of queries and keys, from kernels that keep heads apart, or from the configuration.
fn set_heads(
    family: &Family,
    sizes: &Sizes,
    [inner, depth]: [usize; 2],
    model: &mut ModelConfig,
) -> Result<()> {
    let given = match model.dimensions() {
        // A named shape stands for its own width alone.
        Ok(dims) if model.heads == 0 && dims.width == inner => dims.heads,
        _ => model.heads,
    };
    let heads = match (sizes.0.get(&'h'), sizes.0.get(&'k')) {
        (Some(heads), _) => *heads,
        (None, Some(0)) => 0,
        (None, Some(head_dim)) => inner / head_dim,
        (None, None) => given,
    };
    if heads == 0 || !inner.is_multiple_of(heads) {
        return Err(error(
            family,
            format_args!(
                "the file does not tell the number of attention heads: set model.heads to a divisor of {inner} (--set \
                 model.heads={}), or name the architecture (trencadis convert --arch){}",
                (inner / 64).max(1),
                hint(family.key, inner, depth)
            ),
        ));
    }
    (model.heads, model.head_dim) = (heads, inner / heads);
    let keys = sizes.0.get(&'j').copied().filter(|keys| *keys != inner);
    model.kv_heads = keys.map_or(0, |keys| keys / model.head_dim);
    if keys.is_some_and(|keys| keys % model.head_dim != 0)
        || (model.kv_heads > 0 && !heads.is_multiple_of(model.kv_heads))
    {
        return Err(error(
            family,
            format_args!(
                "{heads} heads of {} make queries of {inner}, beside which keys of {} cannot be shared; set model.heads \
                 as the network has them",
                model.head_dim,
                keys.unwrap_or_default()
            ),
        ));
    }
    Ok(())
}

struct Tensors<'a>(&'a mut Weights);

impl Tensors<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.tensors.contains_key(name)
    }

    fn len(&self, name: &str) -> Option<usize> {
        self.0.tensors.get(name).map(|(_, values)| values.len())
    }

    /// Whether any of the chosen modules has a bias; if so, gives the others a bias of zeros.
    fn equalise(&mut self, choose: impl Fn(&str) -> bool) -> bool {
        let bias = |name: &str| {
            let stem = name.trim_end_matches("weight").trim_end_matches("gain");
            format!("{stem}bias")
        };
        let chosen: Vec<_> = self
            .0
            .tensors
            .iter()
            .filter(|(name, _)| choose(name))
            .map(|(name, (shape, _))| (bias(name), shape.first().copied().unwrap_or(1)))
            .collect();
        let any = chosen.iter().any(|(bias, _)| self.has(bias));
        if any {
            for (bias, len) in chosen {
                self.0.tensors.entry(bias).or_insert_with(|| (vec![len], vec![0.0; len]));
            }
        }
        any
    }
}

/// The fixed table of MoCo v3 that SimpleViT and big_vision use: with `ω_i = 10000^(−i/(D/4 − 1))`, position (y, x) is
/// `[sin xω | cos xω | sin yω | cos yω]`.
fn sincos(rows: usize, columns: usize, width: usize) -> Vec<f32> {
    let quarter = width / 4;
    let omega: Vec<f64> = (0..quarter).map(|i| 10000f64.powf(-(i as f64) / (quarter - 1) as f64)).collect();
    let mut table = Vec::with_capacity(rows * columns * width);
    for y in 0..rows {
        for x in 0..columns {
            for place in [x, y] {
                table.extend(omega.iter().map(|omega| (place as f64 * omega).sin() as f32));
                table.extend(omega.iter().map(|omega| (place as f64 * omega).cos() as f32));
            }
        }
    }
    table
}
