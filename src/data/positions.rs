//! Where each token of a batch stands: the position-table rows that it reads and their weights, or
//! its Fourier coordinates. Made once a batch on the host.
//!
//! Under fractional coordinates a table of L₀ rows is resampled to the image's L rows (NaViT: "via
//! bilinear interpolation"), each origin's tables by its own filter, see [`PositionResample`]: those of
//! `torch.nn.functional.interpolate`, with and without antialiasing, and that of `scipy.ndimage.zoom`.
//! Two-dimensional filters are separable. An image whose grid is the table's reads it as it is.

use std::collections::HashMap;

use super::batch::{PREFIX, PackedBatch};
use crate::cpu::position::Taps;
use crate::recipe::{
    PositionBasis, PositionCombination, PositionConfig, PositionCoordinate, PositionResample,
};
use crate::{Error, Result};

/// What the live tokens of `batch` read of the position tables: one entry for `flat` (table
/// `[rows·columns]`, index in the row-major order of the image's own grid) and `joint` (table
/// `[rows, columns]` flattened), else two, for the row table `[rows]` and the column table
/// `[columns]`. Prefix tokens read nothing.
///
/// # Errors
/// An absolute grid that is larger than the table; `flat` with fractional coordinates.
pub fn taps(batch: &PackedBatch, config: &PositionConfig) -> Result<Vec<Taps>> {
    let cu_seqlens = &batch.cu_seqlens[..batch.images + 1];
    let (positions, grids) = (&batch.positions, &batch.grids);
    match config.combination {
        PositionCombination::Flat => Ok(vec![flat_taps(positions, cu_seqlens, grids, config)?]),
        PositionCombination::Joint => Ok(vec![joint_taps(positions, cu_seqlens, grids, config)?]),
        PositionCombination::Sum | PositionCombination::Stack | PositionCombination::Product => Ok(vec![
            axis_taps(positions, cu_seqlens, grids, 0, config)?,
            axis_taps(positions, cu_seqlens, grids, 1, config)?,
        ]),
    }
}

/// Longest axis for which resampling filters are kept: there are as many as the square of it.
pub const MAX_RESAMPLED: usize = 4096;
/// Patches along an axis, in sides of a square, up to which an image is resampled as it is.
const SLENDER: usize = 8;

/// Most patches that an image at up to `resolution` pixels may have along an axis. Where tables are resampled, a
/// device keeps the filters of every length, so that bounds it: at eight times the side of a square, which only an
/// image more slender than 64:1 exceeds; it is scaled down. Elsewhere only the type of a position does.
pub fn longest_axis(config: &PositionConfig, resolution: usize, patch: usize) -> usize {
    let table = matches!(config.basis, PositionBasis::Learned | PositionBasis::Sinusoidal);
    if !table || config.coordinate == PositionCoordinate::Absolute {
        return usize::from(PREFIX[0]) - 1;
    }
    (SLENDER * resolution.div_ceil(patch.max(1))).clamp(1, MAX_RESAMPLED)
}

/// Checks that every image of the batch has a place in the position tables of `config`.
///
/// # Errors
/// As [`taps`].
pub fn check(batch: &PackedBatch, config: &PositionConfig) -> Result<()> {
    match config.basis {
        PositionBasis::Learned | PositionBasis::Sinusoidal => taps(batch, config).map(drop),
        PositionBasis::Fourier | PositionBasis::None => Ok(()),
    }
}

/// Taps of the row table (`axis` 0) or the column table (`axis` 1). `positions` and `grids` are
/// those of a [`PackedBatch`], `cu_seqlens` its `images + 1` used entries.
///
/// # Errors
/// An absolute grid that is larger than the table.
pub fn axis_taps(
    positions: &[[u16; 2]],
    cu_seqlens: &[i32],
    grids: &[[u16; 2]],
    axis: usize,
    config: &PositionConfig,
) -> Result<Taps> {
    let mut filters = Filters::default();
    build(positions, cu_seqlens, grids, |taps, grid, tokens| {
        let filter = filters.get(config, axis, resampled_to(config, axis, grid)?);
        for position in tokens {
            for &(index, weight) in filter.of(position[axis]) {
                taps.push(index, weight);
            }
            taps.close();
        }
        Ok(())
    })
}

/// Taps of the one table over the flattened index `row·grid columns + column`.
///
/// # Errors
/// A grid with more patches than the table; fractional coordinates, which a flattened index does
/// not have.
pub fn flat_taps(
    positions: &[[u16; 2]],
    cu_seqlens: &[i32],
    grids: &[[u16; 2]],
    config: &PositionConfig,
) -> Result<Taps> {
    if config.coordinate != PositionCoordinate::Absolute {
        return Err(Error::usage(
            "model.position.combination = \"flat\" has no fractional coordinates: set \
             model.position.coordinate = \"absolute\", or combination = \"joint\"",
        ));
    }
    build(positions, cu_seqlens, grids, |taps, grid, tokens| {
        let [rows, columns] = grid.map(usize::from);
        let length = config.rows * config.columns;
        if rows * columns > length {
            return Err(Error::usage(format!(
                "an image of {rows}×{columns} patches needs {} positions, the table has {length}: raise \
                 model.position.rows or model.position.columns (their product is the table's length), or \
                 lower the resolution",
                rows * columns
            )));
        }
        for &[row, column] in tokens {
            taps.push(u32::from(row) * columns as u32 + u32::from(column), 1.0);
            taps.close();
        }
        Ok(())
    })
}

/// Taps of the one table over (row, column), index `row·columns + column` with the table's columns.
///
/// # Errors
/// An absolute grid that is larger than the table.
pub fn joint_taps(
    positions: &[[u16; 2]],
    cu_seqlens: &[i32],
    grids: &[[u16; 2]],
    config: &PositionConfig,
) -> Result<Taps> {
    let (mut row_filters, mut column_filters) = (Filters::default(), Filters::default());
    build(positions, cu_seqlens, grids, |taps, grid, tokens| {
        let rows = row_filters.get(config, 0, resampled_to(config, 0, grid)?);
        let columns = column_filters.get(config, 1, resampled_to(config, 1, grid)?);
        for &[row, column] in tokens {
            for &(row, row_weight) in rows.of(row) {
                for &(column, weight) in columns.of(column) {
                    taps.push(row * config.columns as u32 + column, row_weight * weight);
                }
            }
            taps.close();
        }
        Ok(())
    })
}

/// Fourier coordinates (y, x) of the live tokens: patch indices, or indices divided by the image's
/// rows and columns, or both divided by the longer side; NaN for prefix tokens.
pub fn coordinates(
    positions: &[[u16; 2]],
    cu_seqlens: &[i32],
    grids: &[[u16; 2]],
    coordinate: PositionCoordinate,
) -> Vec<[f32; 2]> {
    let mut coordinates = Vec::with_capacity(live(cu_seqlens));
    for (image, &[rows, columns]) in cu_seqlens.windows(2).zip(grids) {
        let sides = match coordinate {
            PositionCoordinate::Absolute => [1; 2],
            PositionCoordinate::Fractional => [rows, columns],
            PositionCoordinate::FractionalAspect => [rows.max(columns); 2],
        };
        for &[row, column] in &positions[image[0] as usize..image[1] as usize] {
            coordinates.push(if [row, column] == PREFIX {
                [f32::NAN; 2]
            } else {
                [f32::from(row) / f32::from(sides[0]), f32::from(column) / f32::from(sides[1])]
            });
        }
    }
    coordinates
}

/// The fixed table of Vaswani et al. 2017, `[rows, width]`: with `h = width/2` frequencies
/// `ω_i = 10000^(−i/h)`, row `p` is `[sin(p ω_0), …, sin(p ω_{h−1}) | cos(p ω_0), …]`; the last
/// column of an odd width is 0.
pub fn sinusoidal_table(rows: usize, width: usize) -> Vec<f32> {
    let half = width / 2;
    let mut table = vec![0.0; rows * width];
    for (p, row) in table.chunks_exact_mut(width.max(1)).enumerate() {
        for i in 0..half {
            let angle = p as f64 * 10000f64.powf(-(i as f64) / half as f64);
            row[i] = angle.sin() as f32;
            row[half + i] = angle.cos() as f32;
        }
    }
    table
}

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
struct Filter {
    start: Vec<usize>,
    taps: Vec<(u32, f32)>,
}

impl Filter {
    fn of(&self, index: u16) -> &[(u32, f32)] {
        let index = usize::from(index);
        &self.taps[self.start[index]..self.start[index + 1]]
    }

    /// Resamples a table of `from` rows to `to` rows.
    fn new(from: usize, to: usize, resample: PositionResample) -> Self {
        let mut filter = Self { start: vec![0], taps: Vec::new() };
        for index in 0..to {
            let weights = weights(from, to, index, resample).into_iter().filter(|&(_, weight)| weight != 0.0);
            filter.taps.extend(weights.map(|(index, weight)| (index as u32, weight as f32)));
            filter.start.push(filter.taps.len());
        }
        filter
    }

    /// Every row of a table as it is.
    fn identity(rows: usize) -> Self {
        Self { start: (0..=rows).collect(), taps: (0..rows as u32).map(|row| (row, 1.0)).collect() }
    }
}

/// The filters that a batch has needed so far, by length of the resampled axis; none: the table as it is.
#[derive(Debug, Default)]
struct Filters(HashMap<Option<usize>, Filter>);

impl Filters {
    fn get(&mut self, config: &PositionConfig, axis: usize, length: Option<usize>) -> &Filter {
        self.0.entry(length).or_insert_with(|| {
            let from = if axis == 0 { config.rows } else { config.columns };
            length.map_or_else(|| Filter::identity(from), |length| Filter::new(from, length, config.resample))
        })
    }
}

/// The length to which the table of `axis` is resampled for an image; none where it is read as it is: under absolute
/// coordinates, and where the grid is the table's.
fn resampled_to(config: &PositionConfig, axis: usize, grid: [u16; 2]) -> Result<Option<usize>> {
    let grid = grid.map(usize::from);
    let table = [config.rows, config.columns];
    let sides = match config.coordinate {
        PositionCoordinate::Absolute if grid[axis] > table[axis] => {
            return Err(Error::usage(format!(
                "an image of {}×{} patches does not fit the position table of {}×{}: raise model.position.{} \
                 to at least {}, take fractional coordinates, or lower the resolution",
                grid[0],
                grid[1],
                config.rows,
                config.columns,
                ["rows", "columns"][axis],
                grid[axis]
            )));
        }
        PositionCoordinate::Absolute => table,
        PositionCoordinate::Fractional => grid,
        PositionCoordinate::FractionalAspect => [grid[0].max(grid[1]); 2],
    };
    Ok((sides != table).then_some(sides[axis]))
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

fn live(cu_seqlens: &[i32]) -> usize {
    cu_seqlens.last().map_or(0, |&end| end as usize)
}

impl Taps {
    fn push(&mut self, index: u32, weight: f32) {
        self.index.push(index);
        self.weight.push(weight);
    }

    /// Ends the taps of a token.
    fn close(&mut self) {
        self.start.push(self.index.len() as u32);
    }
}

/// Taps of all live tokens; `patches` appends those of the patch tokens of one image, which it is
/// given with the image's grid.
fn build(
    positions: &[[u16; 2]],
    cu_seqlens: &[i32],
    grids: &[[u16; 2]],
    mut patches: impl FnMut(&mut Taps, [u16; 2], &[[u16; 2]]) -> Result<()>,
) -> Result<Taps> {
    let tokens = live(cu_seqlens);
    let mut taps = Taps {
        start: Vec::with_capacity(tokens + 1),
        index: Vec::with_capacity(2 * tokens),
        weight: Vec::with_capacity(2 * tokens),
    };
    taps.close();
    for (image, &grid) in cu_seqlens.windows(2).zip(grids) {
        let tokens = &positions[image[0] as usize..image[1] as usize];
        let prefix = tokens.iter().take_while(|&&position| position == PREFIX).count();
        for _ in 0..prefix {
            taps.close();
        }
        if prefix < tokens.len() {
            patches(&mut taps, grid, &tokens[prefix..])?;
        }
    }
    Ok(taps)
}
