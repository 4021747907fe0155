//! Where each token of a batch stands: the position-table rows that it reads and their weights, or
//! its Fourier coordinates. Made once a batch on the host.
//!
//! Under fractional coordinates a table of L₀ rows is resampled to the image's L rows (NaViT: "via
//! bilinear interpolation"), each origin's tables in its own way, by the filters of [`ops`](crate::ops). An image
//! whose grid is the table's reads it as it is.

use std::collections::HashMap;

use super::batch::{PREFIX, PackedBatch};
use crate::cpu::position::Taps;
use crate::ops::{Filter, PositionBasis, PositionCombination, PositionConfig, PositionCoordinate};
pub use crate::ops::{FilterBank, MAX_RESAMPLED};
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
