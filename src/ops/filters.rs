//! Filters that resample a position table to another number of rows, each origin's by its own, see
//! [`PositionResample`]: those of `torch.nn.functional.interpolate`, with and without antialiasing, and that of
//! `scipy.ndimage.zoom`. Two-dimensional filters are separable.

use super::{PositionConfig, PositionCoordinate, PositionResample};

/// Longest axis for which resampling filters are kept: there are as many as the square of it.
pub const MAX_RESAMPLED: usize = 4096;

/// The resampling filters of one axis for every length up to [`longest`](Self::longest): what a device keeps, so
/// that it finds the taps of any batch. Index `i` of an axis of `L` patches reads `taps[start[s]..start[s + 1]]`,
/// `s = L·(L − 1)/2 + i`. They are of no account for a grid that is the table's, which is read as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct FilterBank {
    /// `[longest·(longest + 1)/2 + 1]`.
    pub start: Vec<u32>,
    /// Table rows and weights.
    pub taps: Vec<(u32, f32)>,
    /// The longest axis that has a filter.
    pub longest: usize,
}

impl FilterBank {
    /// The filters of the row axis (`axis` 0) or the column axis (`axis` 1) of a table under fractional
    /// coordinates; none under absolute ones, which read one table row each.
    pub fn new(config: &PositionConfig, axis: usize, longest: usize) -> Option<Self> {
        if config.coordinate == PositionCoordinate::Absolute {
            return None;
        }
        let from = if axis == 0 { config.rows } else { config.columns };
        let mut bank = Self { start: vec![0], taps: Vec::new(), longest };
        for length in 1..=longest {
            let filter = Filter::new(from, length, config.resample);
            let before = bank.taps.len();
            bank.start.extend(filter.start[1..].iter().map(|&start| (before + start) as u32));
            bank.taps.extend(filter.taps);
        }
        Some(bank)
    }
}

/// Table rows and weights for every index of one axis.
#[derive(Debug, Default)]
pub struct Filter {
    start: Vec<usize>,
    taps: Vec<(u32, f32)>,
}

impl Filter {
    /// Table rows that index `index` reads, each with its weight.
    pub fn of(&self, index: u16) -> &[(u32, f32)] {
        let index = usize::from(index);
        &self.taps[self.start[index]..self.start[index + 1]]
    }

    /// Resamples a table of `from` rows to `to` rows, both at least 1.
    pub fn new(from: usize, to: usize, resample: PositionResample) -> Self {
        let mut filter = Self { start: vec![0], taps: Vec::new() };
        for index in 0..to {
            let weights = weights(from, to, index, resample).into_iter().filter(|&(_, weight)| weight != 0.0);
            filter.taps.extend(weights.map(|(index, weight)| (index as u32, weight as f32)));
            filter.start.push(filter.taps.len());
        }
        filter
    }

    /// Every row of a table as it is.
    pub fn identity(rows: usize) -> Self {
        Self { start: (0..=rows).collect(), taps: (0..rows as u32).map(|row| (row, 1.0)).collect() }
    }
}

/// The matrix `[to, from]`, row-major, by which `resample` makes an axis of `to` places of one of `from`.
///
/// # Panics
/// An axis of no place.
pub fn resize_matrix(from: usize, to: usize, resample: PositionResample) -> Vec<f64> {
    let mut matrix = vec![0.0; to * from];
    for (index, row) in matrix.chunks_exact_mut(from).enumerate() {
        for (place, weight) in weights(from, to, index, resample) {
            row[place] += weight;
        }
    }
    matrix
}

/// Places and weights that index `index` of an axis of `to` reads of one of `from`, in rising order.
fn weights(from: usize, to: usize, index: usize, resample: PositionResample) -> Vec<(usize, f64)> {
    match resample {
        PositionResample::BicubicOffset => cubic_taps(from, (to as f64 + OFFSET) / from as f64, index),
        _ if from == to => vec![(index, 1.0)],
        PositionResample::Linear => linear(from, (index as f64 + 0.5) * from as f64 / to as f64 - 0.5),
        PositionResample::LinearAlignCorners => {
            linear(from, (index * (from - 1)) as f64 / (to - 1).max(1) as f64)
        }
        PositionResample::BicubicNoAntialias => cubic_taps(from, to as f64 / from as f64, index),
        PositionResample::Bilinear => antialiased(from, to, index, 1.0, |x| 1.0 - x),
        PositionResample::Bicubic => antialiased(from, to, index, 2.0, |x| cubic(-0.5, x)),
    }
}

/// What DINO and DINOv2 add to the patches of an image's axis (`interpolate_offset`).
const OFFSET: f64 = 0.1;

/// Rows and weights of a linear filter that reads at `source`, held at the table's ends.
fn linear(from: usize, source: f64) -> Vec<(usize, f64)> {
    let source = source.max(0.0);
    let low = (source.floor() as usize).min(from - 1);
    let high = (low + 1).min(from - 1);
    let weight = source - low as f64;
    if high == low { vec![(low, 1.0)] } else { vec![(low, 1.0 - weight), (high, weight)] }
}

/// Rows and weights of torch's `bicubic` without antialiasing, `align_corners=False`: four taps, of which those
/// beyond the table read its ends. `scale` is the factor by which the table grows.
fn cubic_taps(from: usize, scale: f64, index: usize) -> Vec<(usize, f64)> {
    const A: f64 = -0.75;
    let source = (index as f64 + 0.5) / scale - 0.5;
    let low = source.floor();
    let mut taps: Vec<(usize, f64)> = Vec::with_capacity(4);
    for offset in -1..=2 {
        let at = low + f64::from(offset);
        let (row, weight) = (at.clamp(0.0, (from - 1) as f64) as usize, cubic(A, (source - at).abs()));
        match taps.last_mut() {
            Some(last) if last.0 == row => last.1 += weight,
            _ => taps.push((row, weight)),
        }
    }
    taps
}

/// Window and normalised weights of torch's antialiased resize, which are Pillow's: `kernel` of
/// support `radius`, stretched by the factor of a reduction. It is called with |x| < radius.
fn antialiased(
    from: usize,
    to: usize,
    index: usize,
    radius: f64,
    kernel: impl Fn(f64) -> f64,
) -> Vec<(usize, f64)> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let centre = scale * (index as f64 + 0.5);
    let first = (centre - radius * stretch + 0.5).max(0.0) as usize;
    let end = ((centre + radius * stretch + 0.5) as usize).min(from);
    let mut weights: Vec<(usize, f64)> = (first..end)
        .map(|j| (j, ((j as f64 - centre + 0.5) / stretch).abs()))
        .map(|(j, x)| (j, if x < radius { kernel(x) } else { 0.0 }))
        .collect();
    let sum: f64 = weights.iter().map(|&(_, weight)| weight).sum();
    for (_, weight) in &mut weights {
        *weight /= sum;
    }
    weights
}

/// Keys' cubic of parameter `a`, for 0 ≤ x ≤ 2.
fn cubic(a: f64, x: f64) -> f64 {
    if x < 1.0 { ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0 } else { a * (((x - 5.0) * x + 8.0) * x - 4.0) }
}
