//! Which models can be trained on a device: whether there is a kernel for everything that a step does.
//!
//! The kernels themselves are asked, and what they refuse is told in the terms of the recipe.

use std::fmt::Display;

use crate::device::DeviceInfo;
use crate::error::{Error, Result};
use crate::kernels::attention::Attention;
use crate::kernels::norm::{MAX_WIDTH, Norm};
use crate::kernels::pool::{AttentionPool, MAX_HEAD_DIM, PackedSizes};
use crate::kernels::position::Position;
use crate::nn::attention::{attention_config, pooling_config};
use crate::recipe::shapes::Dimensions;
use crate::recipe::{ModelConfig, PoolKind, PositionBasis};

/// Whether a training step of this model has all its kernels on a device. Nothing is allocated. What depends on
/// the batches too, such as the number of token rows, is left to the launches.
///
/// # Errors
/// One sentence that names keys of the recipe, their values, and the nearest ones that have a kernel; sizes of
/// the model that do not fit together.
pub fn check(config: &ModelConfig) -> Result<()> {
    let dims = config.dimensions()?;
    check_tables(config)?;
    check_width(config, &dims)?;
    check_head_dim(config, &dims)?;
    check_heads(config, &dims)?;
    check_scale(config, &dims)?;
    check_patch(config)
}

fn refuse(what: impl Display, instead: impl Display) -> Result<()> {
    Err(Error::usage(format!("{what} has no kernel on a GPU: take {instead}, or use --device cpu")))
}

/// Of the numbers from 1 to `most` that fit, those next to `value` on either side.
fn nearest(value: usize, most: usize, fits: impl Fn(usize) -> bool) -> Vec<usize> {
    let below = (1..value.min(most + 1)).rev().find(|&n| fits(n));
    let above = (value + 1..=most).find(|&n| fits(n));
    below.into_iter().chain(above).collect()
}

fn either(values: impl IntoIterator<Item = impl Display>) -> String {
    values.into_iter().map(|value| value.to_string()).collect::<Vec<_>>().join(" or ")
}

/// Whether there is a norm of rows of `width` elements.
fn norm_fits(config: &ModelConfig, width: usize) -> bool {
    Norm { tokens: 1, width, kind: config.norm, eps: config.norm_eps }.check().is_ok()
}

fn position_fits(config: &ModelConfig, width: usize) -> bool {
    let position = &config.position;
    position.basis == PositionBasis::None || Position::new(position, 1, 1, width).is_ok()
}

/// Whether there is attention, and attention pooling where the model pools by it.
fn attention_fits(config: &ModelConfig, dims: &Dimensions) -> bool {
    let attention = attention_config(config, dims);
    let pooling = pooling_config(config, dims, config.qk_norm);
    let sizes = PackedSizes { tokens: 1, images: 1, skip: 0 };
    Attention { config: attention, tokens: 1, slots: 1 }.plan(&DeviceInfo::h100()).is_ok()
        && (config.pool != PoolKind::Map
            || AttentionPool { config: pooling, sizes, queries: 1 }.shape().is_ok())
}

/// Whether there is attention over `heads` heads of `head_dim`, whatever the scale.
fn heads_fit(config: &ModelConfig, heads: usize, head_dim: usize) -> bool {
    let config = ModelConfig { attention_scale: 1.0, ..config.clone() };
    // As many as there are heads where the recipe's number does not divide them.
    let kv_heads =
        if config.kv_heads > 0 && heads.is_multiple_of(config.kv_heads) { config.kv_heads } else { heads };
    attention_fits(&config, &Dimensions { width: 0, depth: 0, mlp: 0, heads, kv_heads, head_dim })
}

fn check_tables(config: &ModelConfig) -> Result<()> {
    // A width that every table has.
    const WIDTH: usize = 16;
    if position_fits(config, WIDTH) {
        return Ok(());
    }
    let [rows, columns] = [config.position.rows, config.position.columns];
    let instead = nearest(rows, rows, |rows| {
        let mut config = config.clone();
        config.position.rows = rows;
        position_fits(&config, WIDTH)
    });
    refuse(
        format_args!("model.position.rows = {rows} with model.position.columns = {columns}"),
        format_args!("model.position.rows = {}", either(instead)),
    )
}

fn check_width(config: &ModelConfig, dims: &Dimensions) -> Result<()> {
    let Dimensions { width, heads, .. } = *dims;
    let fits = |width| norm_fits(config, width) && position_fits(config, width);
    if fits(width) {
        return Ok(());
    }
    let reason = match config.position.basis {
        _ if !norm_fits(config, width) => "",
        PositionBasis::Fourier => " with model.position.basis = \"fourier\"",
        _ => " with model.position.combination = \"stack\"",
    };
    // Where the head dim follows from the width, that has to fit as well.
    let divides = |width: usize| width.is_multiple_of(heads) && heads_fit(config, heads, width / heads);
    let mut instead = nearest(width, MAX_WIDTH, |w| fits(w) && (config.head_dim > 0 || divides(w)));
    if instead.is_empty() {
        instead = nearest(width, MAX_WIDTH, fits);
    }
    refuse(format_args!("model.width = {width}{reason}"), format_args!("model.width = {}", either(instead)))
}

fn check_head_dim(config: &ModelConfig, dims: &Dimensions) -> Result<()> {
    let Dimensions { width, heads, head_dim, .. } = *dims;
    let fits = |head_dim| heads_fit(config, 1, head_dim);
    if fits(head_dim) {
        return Ok(());
    }
    if config.head_dim > 0 {
        let instead = either(nearest(head_dim, MAX_HEAD_DIM, fits));
        return refuse(
            format_args!("model.head_dim = {head_dim}"),
            format_args!("model.head_dim = {instead}"),
        );
    }
    let instead = nearest(heads, width, |heads| width.is_multiple_of(heads) && fits(width / heads));
    let instead = instead.iter().map(|heads| format!("{heads} (a head dim of {})", width / heads));
    refuse(
        format_args!("model.heads = {heads} at model.width = {width}, a head dim of {head_dim},"),
        format_args!("model.heads = {}", either(instead)),
    )
}

fn check_heads(config: &ModelConfig, dims: &Dimensions) -> Result<()> {
    let Dimensions { heads, head_dim, .. } = *dims;
    let fits = |heads| heads_fit(config, heads, head_dim);
    if fits(heads) {
        return Ok(());
    }
    refuse(
        format_args!("model.heads = {heads}"),
        format_args!("model.heads = {}", either(nearest(heads, heads, fits))),
    )
}

fn check_scale(config: &ModelConfig, dims: &Dimensions) -> Result<()> {
    if attention_fits(config, dims) {
        return Ok(());
    }
    refuse(
        format_args!("model.attention_scale = {:e}", config.attention_scale),
        format_args!("0 or at least {:e}", f32::MIN_POSITIVE),
    )
}

fn check_patch(config: &ModelConfig) -> Result<()> {
    let ModelConfig { patch, channels, .. } = *config;
    let fits = |patch: usize| norm_fits(config, channels * patch * patch);
    if !config.patch_norm_in || fits(patch) {
        return Ok(());
    }
    let instead = either(nearest(patch, MAX_WIDTH.isqrt(), fits));
    refuse(
        format_args!(
            "model.patch_norm_in = true over patches of {} values, model.patch = {patch} with model.channels = \
             {channels},",
            config.patch_dim()
        ),
        format_args!("model.patch = {instead}, or model.patch_norm_in = false"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::shapes::SHAPES;
    use crate::recipe::{PositionCombination, PositionConfig};

    fn small() -> ModelConfig {
        ModelConfig { width: 96, heads: 6, ..ModelConfig::default() }
    }

    #[test]
    fn every_shape_has_its_kernels() {
        for shape in SHAPES {
            for combination in [PositionCombination::Sum, PositionCombination::Stack] {
                let position = PositionConfig { combination, ..PositionConfig::default() };
                check(&ModelConfig { shape: shape.name.into(), position, ..ModelConfig::default() }).unwrap();
            }
        }
        check(&small()).unwrap();
    }

    #[test]
    fn refusals_name_keys_and_what_to_take_instead() {
        let with = |change: &dyn Fn(&mut ModelConfig)| {
            let mut config = small();
            change(&mut config);
            config
        };
        let cases: [(&str, ModelConfig, &str, &str); 13] = [
            ("width", with(&|c| c.width = 90), "model.width = 90", "model.width = 48 or 96"),
            (
                "a head dim of its own lets the width be any multiple of 8",
                with(&|c| (c.width, c.head_dim) = (90, 16)),
                "model.width = 90",
                "model.width = 88 or 96",
            ),
            (
                "wider than any norm",
                with(&|c| (c.width, c.head_dim) = (9000, 64)),
                "model.width = 9000",
                "model.width = 8192",
            ),
            (
                "a width that so many heads cannot share",
                with(&|c| (c.width, c.heads) = (9000, 3000)),
                "model.width = 9000",
                "model.width = 8192",
            ),
            (
                "stacked positions",
                with(&|c| {
                    (c.width, c.heads) = (104, 13);
                    c.position.combination = PositionCombination::Stack;
                }),
                "model.width = 104 with model.position.combination = \"stack\"",
                "model.width = 208",
            ),
            (
                "Fourier positions",
                with(&|c| {
                    (c.width, c.heads) = (104, 1);
                    c.position.basis = PositionBasis::Fourier;
                }),
                "model.width = 104 with model.position.basis = \"fourier\"",
                "model.width = 96 or 112",
            ),
            (
                "heads",
                with(&|c| c.heads = 8),
                "model.heads = 8 at model.width = 96, a head dim of 12,",
                "model.heads = 6 (a head dim of 16) or 12 (a head dim of 8)",
            ),
            (
                "one wide head",
                with(&|c| (c.width, c.heads) = (192, 1)),
                "model.heads = 1 at model.width = 192, a head dim of 192,",
                "model.heads = 2 (a head dim of 96)",
            ),
            ("head dim", with(&|c| c.head_dim = 12), "model.head_dim = 12", "model.head_dim = 8 or 16"),
            ("wide head", with(&|c| c.head_dim = 300), "model.head_dim = 300", "model.head_dim = 128"),
            (
                "patch",
                with(&|c| (c.patch, c.channels, c.patch_norm_in) = (6, 1, true)),
                "model.patch_norm_in = true over patches of 36 values, model.patch = 6 with model.channels = 1,",
                "model.patch = 4 or 8, or model.patch_norm_in = false",
            ),
            (
                "heads",
                with(&|c| (c.heads, c.head_dim) = (5000, 8)),
                "model.heads = 5000",
                "model.heads = 4096",
            ),
            (
                "tables",
                with(&|c| (c.position.rows, c.position.columns) = (40_000, 50_000)),
                "model.position.rows = 40000 with model.position.columns = 50000",
                "model.position.rows = 21474",
            ),
        ];
        for (name, config, what, instead) in cases {
            config.validate().unwrap();
            let error = check(&config).unwrap_err();
            let expected = format!("{what} has no kernel on a GPU: take {instead}, or use --device cpu");
            assert_eq!((error.to_string(), error.exit_code()), (expected, 2), "{name}");
        }
        let scaled = |attention_scale| check(&ModelConfig { attention_scale, ..small() });
        let error = scaled(1e-39).unwrap_err().to_string();
        assert!(
            error.starts_with("model.attention_scale = 1e-39 has no kernel on a GPU: take 0 or"),
            "{error}"
        );
        scaled(f64::from(f32::MIN_POSITIVE)).unwrap();
        let large = ModelConfig { patch: 60, patch_norm_in: true, ..small() };
        assert!(check(&large).unwrap_err().to_string().contains("take model.patch = 52, or"));
        check(&ModelConfig { patch_norm_in: false, ..large }).unwrap();
    }

    /// Whatever width, heads or head dim is advised is not refused again.
    #[test]
    fn advice_can_be_followed() {
        for (width, heads) in (1..=300).flat_map(|width| (1..=12).map(move |heads| (width, heads))) {
            for (head_dim, combination) in [
                (0, PositionCombination::Stack),
                (0, PositionCombination::Sum),
                (3 * heads, PositionCombination::Sum),
            ] {
                let mut config = ModelConfig { width, heads, head_dim, ..small() };
                config.position.combination = combination;
                if config.validate().is_err() {
                    continue;
                }
                let mut refused = 0;
                while let Err(error) = check(&config) {
                    let error = error.to_string();
                    let (_, advice) = error.split_once("take model.").unwrap();
                    let (key, values) = advice.split_once(" = ").unwrap();
                    let value = values.split([' ', ',']).next().unwrap().parse().unwrap();
                    match key {
                        "width" => config.width = value,
                        "heads" => config.heads = value,
                        _ => config.head_dim = value,
                    }
                    config.validate().unwrap();
                    refused += 1;
                    assert!(refused <= 1 + usize::from(head_dim > 0), "{config:?}: {error}");
                }
            }
        }
    }
}
