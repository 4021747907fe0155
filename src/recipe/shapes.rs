//! The named sizes of Vision Transformers.
//!
//! Sources: Dosovitskiy et al. 2021 (B, L, H), Touvron et al. 2021 and 2022 (Ti, S, M, H-52), Zhai et
//! al. 2022 (g, G), Chen et al. 2022 (e), Alabdulmohsin et al. 2023 (So400m, g-opt, G-opt), Dehghani et
//! al. 2023 (22B), as big_vision's `decode_variant` and DeiT III's `models_v2.py` write them.

use super::ModelConfig;
use crate::{Error, Result};

/// A row of the shape table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Name, case-sensitive: `g` and `G` differ.
    pub name: &'static str,
    /// Model width D.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Hidden width of the MLP.
    pub mlp: usize,
    /// Attention heads.
    pub heads: usize,
}

/// The shape table, smallest first.
pub const SHAPES: &[Shape] = &[
    shape("mu", 32, 1, 128, 2),
    shape("Ti", 192, 12, 768, 3),
    shape("S", 384, 12, 1536, 6),
    shape("M", 512, 12, 2048, 8),
    shape("B", 768, 12, 3072, 12),
    shape("L", 1024, 24, 4096, 16),
    shape("So400m", 1152, 27, 4304, 16),
    shape("H", 1280, 32, 5120, 16),
    shape("H-52", 1280, 52, 5120, 16),
    shape("g", 1408, 40, 6144, 16),
    shape("g-opt", 1536, 40, 6144, 16),
    shape("G", 1664, 48, 8192, 16),
    shape("G-opt", 1536, 48, 8192, 16),
    shape("e", 1792, 56, 15360, 16),
    shape("22B", 6144, 48, 24576, 48),
];

const fn shape(name: &'static str, width: usize, depth: usize, mlp: usize, heads: usize) -> Shape {
    Shape { name, width, depth, mlp, heads }
}

/// The sizes of one network, all positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dimensions {
    /// Model width D.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Hidden width of the MLP.
    pub mlp: usize,
    /// Attention heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of one head; queries are `heads · head_dim` wide, keys and values `kv_heads · head_dim` each.
    pub head_dim: usize,
}

/// The candidate nearest to `wanted`, if any is near enough to be what was meant.
pub(crate) fn nearest<'a>(wanted: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted_lower = wanted.to_lowercase();
    candidates
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&wanted_lower, &name.to_lowercase()), name))
        .filter(|(distance, name)| *distance <= (wanted.len().max(name.len()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

impl ModelConfig {
    /// Width, depth, MLP width and heads: the non-zero ones of this configuration, the others from
    /// the table row that `shape` names.
    ///
    /// # Errors
    /// An unknown shape, a size that neither gives, a head count that does not divide the width, or one of keys and
    /// values that does not divide it.
    pub fn dimensions(&self) -> Result<Dimensions> {
        let row = match self.shape.as_str() {
            "" => shape("", 0, 0, 0, 0),
            name => *SHAPES.iter().find(|s| s.name == name).ok_or_else(|| unknown_shape(name))?,
        };
        let take = |key: &str, own: usize, of_shape: usize| match (own, of_shape) {
            (0, 0) => Err(Error::usage(format!(
                "model.{key} is 0 and model.shape is empty: set model.{key}, or name a shape such as `B`"
            ))),
            (0, value) => Ok(value),
            (value, _) => Ok(value),
        };
        let width = take("width", self.width, row.width)?;
        let depth = take("depth", self.depth, row.depth)?;
        let mlp = take("mlp", self.mlp, row.mlp)?;
        let heads = take("heads", self.heads, row.heads)?;
        let head_dim = match self.head_dim {
            0 if !width.is_multiple_of(heads) => return Err(indivisible(width, heads)),
            0 => width / heads,
            given => given,
        };
        let kv_heads = if self.kv_heads == 0 { heads } else { self.kv_heads };
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::usage(format!(
                "model.kv_heads = {kv_heads} does not divide model.heads = {heads}: the nearest that do are {}; 0 takes as \
                 many as there are heads",
                nearest_divisors(kv_heads, heads)
            )));
        }
        Ok(Dimensions { width, depth, mlp, heads, kv_heads, head_dim })
    }
}

fn unknown_shape(name: &str) -> Error {
    let known: Vec<_> = SHAPES.iter().map(|s| s.name).collect();
    let hint = nearest(name, known.iter().copied()).map_or(String::new(), |n| format!(" (nearest: `{n}`)"));
    Error::usage(format!("model.shape `{name}` is unknown{hint}; the shapes are {}", known.join(", ")))
}

fn indivisible(width: usize, heads: usize) -> Error {
    Error::usage(format!(
        "model.heads = {heads} does not divide model.width = {width}: the nearest head counts that do are {}; \
         or set model.head_dim",
        nearest_divisors(heads, width)
    ))
}

/// The divisors of `of` next to `value` on either side.
fn nearest_divisors(value: usize, of: usize) -> String {
    let below = (1..value.min(of + 1)).rev().find(|n| of.is_multiple_of(*n));
    let above = (value + 1..=of).find(|n| of.is_multiple_of(*n));
    let nearest: Vec<_> = below.into_iter().chain(above).map(|n| n.to_string()).collect();
    nearest.join(" and ")
}
