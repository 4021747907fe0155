//! To which size an image is resized: resolution R means area R², whatever the aspect ratio
//! (NaViT, sections 2.2 and 3.2), so that R fixes the number of tokens and not the shape.

use rand::RngExt;
use rand_distr::StandardNormal;
use serde::{Deserialize, Serialize};

pub use crate::ops::Grid;
use crate::recipe::{AspectKind, RemainderKind, ResolutionConfig, ResolutionKind, ResolutionOf};
use crate::rng::Stream;

/// What an image becomes before it is cut into patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Patches that are cut, from the top left corner of the resized image.
    pub grid: Grid,
    /// Height in pixels after resizing; at least `grid.rows` patches.
    pub height: usize,
    /// Width in pixels after resizing; at least `grid.cols` patches.
    pub width: usize,
    /// Whether the image was made smaller than its resolution asked for, to fit the token limit.
    pub downscaled: bool,
}

/// What bounds a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Patches, at least 1.
    pub patches: usize,
    /// Patch rows, at least 1.
    pub rows: usize,
    /// Patch columns, at least 1.
    pub cols: usize,
}

impl Limits {
    /// Only what 16-bit positions allow, whose largest value stands for prefix tokens.
    pub const NONE: Self =
        Self { patches: usize::MAX, rows: u16::MAX as usize - 1, cols: u16::MAX as usize - 1 };

    fn allow(&self, grid: Grid) -> bool {
        grid.patches() <= self.patches && grid.rows <= self.rows && grid.cols <= self.cols
    }
}

/// Draws a resolution R in pixels. `Fixed` and `Native` return `max`.
pub fn draw(config: &ResolutionConfig, stream: &mut Stream) -> f64 {
    let share = match config.kind {
        ResolutionKind::Fixed | ResolutionKind::Native => return config.max as f64,
        ResolutionKind::Uniform => f64::from(stream.uniform()),
        ResolutionKind::TruncatedNormal => (truncated_normal(config.mean, config.std, stream) + 1.0) / 2.0,
    };
    at(config, share)
}

/// u ~ N(mean, std) given that u lies in [−1, 1]. Ends because a checked recipe keeps `mean` in
/// [−1, 1] and `std` in (0, 10], where at least 7 % of the draws are accepted.
fn truncated_normal(mean: f64, std: f64, stream: &mut Stream) -> f64 {
    loop {
        let u = mean + std * stream.sample::<f64, _>(StandardNormal);
        if (-1.0..=1.0).contains(&u) {
            return u;
        }
    }
}

/// Resize target of an image of `size` (height, width) at `resolution`, in patches of side
/// `patch`, within `limits`.
///
/// The ideal size h' × w' has the area R² and the image's aspect ratio (or is square; `Native`
/// never enlarges it beyond its own). `Round` takes the nearest grid, so that no side is distorted
/// by more than half a patch, at least one patch; `Drop` resizes to the ideal size, at least one
/// patch a side, and cuts off the remainder. An image beyond the limits is scaled down by the
/// largest factor that fits.
pub fn target(
    config: &ResolutionConfig,
    patch: usize,
    limits: Limits,
    size: (usize, usize),
    resolution: f64,
) -> Target {
    let (height, width) = ideal(config, size, resolution);
    let at = |scale: f64| grid(config.remainder, patch, height * scale, width * scale);
    let full = at(1.0);
    if limits.allow(full.grid) {
        return full;
    }
    // Neither side ever falls as the scale grows, so bisection finds the largest that fits;
    // scale 0 is a single patch.
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..48 {
        let middle = 0.5 * (low + high);
        if limits.allow(at(middle).grid) {
            low = middle;
        } else {
            high = middle;
        }
    }
    Target { downscaled: true, ..at(low) }
}

/// Most patches that [`target`] gives any image at up to `resolution` pixels, rounded up: h·w patches of an ideal grid
/// become at most (h + ½)(w + ½), or one row as long as the limits allow.
pub fn most_patches(config: &ResolutionConfig, patch: usize, limits: Limits, resolution: f64) -> usize {
    if config.aspect == AspectKind::Square {
        return target(config, patch, limits, (1 << 20, 1 << 20), resolution).grid.patches();
    }
    let area = (resolution / patch as f64).powi(2);
    let axis = limits.rows.max(limits.cols);
    let long = (axis as f64).min(2.0 * area).max(area.sqrt());
    let most = (area + 0.5 * (long + area / long) + 0.25).ceil() as usize;
    most.max(axis.min(limits.patches)).min(limits.patches)
}

/// Ideal (height, width) in real pixels, before rounding to a grid.
pub fn ideal(config: &ResolutionConfig, size: (usize, usize), resolution: f64) -> (f64, f64) {
    let (height, width) = (size.0 as f64, size.1 as f64);
    let side = (height * width).sqrt();
    let scale = resolution / side;
    let scale = if config.kind == ResolutionKind::Native { scale.min(1.0) } else { scale };
    match config.aspect {
        AspectKind::Native => (height * scale, width * scale),
        AspectKind::Square => (side * scale, side * scale),
    }
}

fn grid(remainder: RemainderKind, patch: usize, height: f64, width: f64) -> Target {
    match remainder {
        RemainderKind::Round => {
            let side = |pixels: f64| ((pixels / patch as f64).round() as usize).max(1);
            let grid = Grid { rows: side(height), cols: side(width) };
            Target { grid, height: grid.rows * patch, width: grid.cols * patch, downscaled: false }
        }
        RemainderKind::Drop => {
            let side = |pixels: f64| (pixels.round() as usize).max(patch);
            let (height, width) = (side(height), side(width));
            let grid = Grid { rows: height / patch, cols: width / patch };
            Target { grid, height, width, downscaled: false }
        }
    }
}

/// `E[R²]` in pixels² of a drawn resolution; `max²` for `Fixed` and `Native`.
pub fn mean_area(config: &ResolutionConfig) -> f64 {
    mean(config, |resolution| resolution * resolution)
}

/// `E[f(R)]` of a drawn resolution R in pixels, by the midpoint rule over the distribution's own coordinate; `f(max)`
/// for `Fixed` and `Native`.
pub fn mean(config: &ResolutionConfig, f: impl Fn(f64) -> f64) -> f64 {
    let max = config.max as f64;
    if matches!(config.kind, ResolutionKind::Fixed | ResolutionKind::Native) {
        return f(max);
    }
    let points = 256;
    let (mut sum, mut weights) = (0.0, 0.0);
    for i in 0..points {
        let share = (f64::from(i) + 0.5) / f64::from(points);
        let weight = match config.kind {
            ResolutionKind::TruncatedNormal => {
                (-0.5 * ((2.0 * share - 1.0 - config.mean) / config.std).powi(2)).exp()
            }
            _ => 1.0,
        };
        sum += weight * f(at(config, share));
        weights += weight;
    }
    if weights > 0.0 { sum / weights } else { f(max) }
}

/// The resolution at a share of the way from `min` to `max`, in the coordinate that is drawn.
fn at(config: &ResolutionConfig, share: f64) -> f64 {
    let (min, max) = (config.min as f64, config.max as f64);
    match config.of {
        ResolutionOf::Side => min + share * (max - min),
        ResolutionOf::Area => (min * min + share * (max * max - min * min)).sqrt(),
    }
}
