//! Weights of other implementations: tables of their names, and the model settings that reproduce their networks.
//!
//! A file holds names and shapes but not everything that a forward pass needs. What the shapes
//! determine is derived (width, depth, biases, QK-norm, pooling, tables); what they do not
//! (the head count without QK-norm, the kind of GELU, the resampling of positions, norm epsilons) is what the
//! implementation always does, or comes from the configuration or a named architecture ([`arch`]).
//!
//! | file | concept |
//! |---|---|
//! | `tables/*.txt`, `table` | which tensor is which, one table a family of networks |
//! | `axes` | shapes in letters, values in another order |
//! | `reading` | which family a file is of, its sizes, what is wrong with it |
//! | `convert` | values by a table, forwards and backwards |
//! | `describe` | the model's settings |
//! | [`arch`] | architectures by name |
//! | [`export`] | our weights under timm's names |

pub mod arch;
mod axes;
mod convert;
mod describe;
pub mod export;
mod reading;
mod table;

use std::collections::BTreeSet;

use super::Weights;
use crate::recipe::{ModelConfig, Recipe};
use crate::{Error, Result};
use reading::Reading;

/// Rows that are to be added to the first prefix tokens: the positions of a cls token, which a file may hold apart.
pub const PREFIX_POSITIONS: &str = "position.prefix";

/// Weights of a known implementation under our names.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The tensors. Positions of prefix tokens stand by themselves, so that nothing is lost: see [`fold_prefix`].
    pub weights: Weights,
    /// Key of the table of names; none for our own.
    pub origin: Option<&'static str>,
    /// The implementation, for people; empty for our own.
    pub name: &'static str,
}

/// Converts the weights of a known implementation, recognised by its names, and sets in `model` what they determine.
/// Weights with this crate's names are returned as they are, with positions of prefix tokens added to these.
///
/// # Errors
/// Names of no known implementation; every tensor that is missing, unexpected or of another shape; numbers that are
/// none; a head count that must be set.
pub fn detect_and_convert(weights: Weights, model: &mut ModelConfig) -> Result<Weights> {
    let mut weights = convert(weights, model)?.weights;
    fold_prefix(&mut weights)?;
    Ok(weights)
}

/// As [`detect_and_convert`], with positions of prefix tokens apart.
///
/// # Errors
/// As there.
pub fn convert(weights: Weights, model: &mut ModelConfig) -> Result<Converted> {
    let grid = [model.position.rows, model.position.columns];
    convert_of_grid(weights, model, Some(grid))
}

/// As [`detect_and_convert`], for weights that a training of `target` is to start from: gives the model that they are
/// the weights of. What their names and shapes do not tell is as their implementation usually has it, and only then as
/// `target` has it. A table of positions is of its own grid, which may be another than that of `target`.
///
/// # Errors
/// As there; a table of positions that is no square.
pub fn initial(weights: Weights, target: &ModelConfig) -> Result<(Weights, ModelConfig)> {
    let usual = usual_settings(&weights)?;
    let mut model = Recipe { model: target.clone(), ..Recipe::default() }.with_sets(usual)?.model;
    let mut weights = convert_of_grid(weights, &mut model, None)?.weights;
    fold_prefix(&mut weights)?;
    Ok((weights, model))
}

/// Rows and columns of a flat table of positions are those of `grid` if these are as many, else a square.
fn convert_of_grid(weights: Weights, model: &mut ModelConfig, grid: Option<[usize; 2]>) -> Result<Converted> {
    if weights.tensors.contains_key("patch_embed.weight") {
        check_finite(&weights)?;
        return Ok(Converted { weights, origin: None, name: "" });
    }
    let weights = unroll(weights);
    let reading = Reading::new(&weights)?;
    let family = reading.family;
    let mut hints = model.clone();
    [hints.position.rows, hints.position.columns] = grid.unwrap_or_default();
    let (sizes, no_grid) = reading.sizes(&weights, &hints);
    reading.check(&weights, &sizes)?;
    if let Some(reason) = no_grid {
        let how = if grid.is_none() {
            " in `trencadis convert`, and start from the file that it writes"
        } else {
            ""
        };
        return Err(reading::error(family, format_args!("{reason}{how}")));
    }
    check_finite(&weights).map_err(|cause| reading::error(family, cause))?;
    let mut weights = convert::forwards(&reading, weights, &sizes)?;
    let mut described = model.clone();
    describe::describe(family, &mut weights, &sizes, reading.depth, &mut described)?;
    *model = described;
    Ok(Converted { weights, origin: Some(family.key), name: &family.name })
}

/// Settings that files of `weights`' implementation usually go with, `key=value`; none for our own names.
///
/// # Errors
/// Names of no known implementation.
pub fn usual_settings(weights: &Weights) -> Result<&'static [String]> {
    match weights.tensors.contains_key("patch_embed.weight") {
        true => Ok(&[]),
        false => {
            let shapes = weights.tensors.iter().map(|(name, (shape, _))| (name.as_str(), shape.as_slice()));
            Ok(&Reading::new(&outline(shapes))?.family.usual)
        }
    }
}

/// Names of what is no part of a network, such as a text tower or indices, by the names and shapes of all tensors in a
/// file; none where the implementation is not known.
pub fn ignored<'a>(shapes: impl Iterator<Item = (&'a str, &'a [usize])>) -> BTreeSet<String> {
    let outline = outline(shapes);
    if outline.tensors.contains_key("patch_embed.weight") {
        return BTreeSet::new();
    }
    Reading::new(&outline).map(|reading| reading.ignored).unwrap_or_default()
}

/// Names and shapes without values, and of blocks that flax has scanned over the first: what tells the implementation.
fn outline<'a>(shapes: impl Iterator<Item = (&'a str, &'a [usize])>) -> Weights {
    let tensors = shapes.map(|(name, shape)| match (name.contains(SCANNED), shape) {
        (true, [_, rest @ ..]) => (name.replace(SCANNED, "encoderblock_0/"), (rest.to_vec(), vec![])),
        _ => (name.to_owned(), (shape.to_vec(), vec![])),
    });
    Weights { tensors: tensors.collect(), ..Weights::default() }
}

/// Adds the positions of prefix tokens to these: the model has them as one.
///
/// # Errors
/// Positions without as many tokens.
pub fn fold_prefix(weights: &mut Weights) -> Result<()> {
    let Some((shape, positions)) = weights.tensors.remove(PREFIX_POSITIONS) else { return Ok(()) };
    match weights.tensors.get_mut("prefix") {
        Some((tokens, values)) if tokens.get(1) == shape.get(1) && values.len() >= positions.len() => {
            values.iter_mut().zip(positions).for_each(|(token, position)| *token += position);
            Ok(())
        }
        _ => Err(Error::usage(format!(
            "the weights have {PREFIX_POSITIONS} {shape:?} and no prefix tokens for them"
        ))),
    }
}

/// Part of the names of blocks that flax has scanned over.
const SCANNED: &str = "encoderblock/";

/// Blocks that flax has scanned over, `encoderblock/… [depth, …]`, one by one.
fn unroll(mut weights: Weights) -> Weights {
    let names: Vec<String> = weights.tensors.keys().filter(|name| name.contains(SCANNED)).cloned().collect();
    for name in names {
        let Some((shape, values)) = weights.tensors.get(&name) else { continue };
        let (&[depth, ..], true) = (shape.as_slice(), !values.is_empty()) else { continue };
        let (each, rest) = (values.len() / depth, &shape[1..]);
        let parts: Vec<_> = (0..depth)
            .map(|n| {
                let one = name.replace(SCANNED, &format!("encoderblock_{n}/"));
                (one, (rest.to_vec(), values[n * each..][..each].to_vec()))
            })
            .collect();
        weights.tensors.remove(&name);
        weights.tensors.extend(parts);
    }
    weights
}

/// Names every tensor that holds something other than numbers.
fn check_finite(weights: &Weights) -> Result<()> {
    const SHOWN: usize = 8;
    let broken: Vec<String> = weights
        .tensors
        .iter()
        .filter_map(|(name, (_, values))| {
            let at = values.iter().position(|value| !value.is_finite())?;
            Some(format!("{name} ({} at element {at})", values[at]))
        })
        .collect();
    if broken.is_empty() {
        return Ok(());
    }
    let more = match broken.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Err(Error::usage(format!(
        "some weights are no finite numbers: {}{more}; take a checkpoint from before they were lost",
        broken[..broken.len().min(SHOWN)].join(", ")
    )))
}
