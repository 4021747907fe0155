//! Weights for another grid of patches, or for another patch.
//!
//! A position table is resampled by the filter that its recipe names ([`PositionResample`]). The kernel of a patch
//! embedding follows the patch (FlexiViT, Beyer et al. 2023, section 3.4): with `B` the matrix that resizes a patch,
//! the kernel `w' = (Bᵀ)⁺ w` gives a resized patch the embedding that `w` gave the patch, exactly where patches grow
//! and as closely as can be where they shrink. `B` is separable, and so is its pseudo-inverse.

use super::Weights;
use crate::ops::resize_matrix;
use crate::recipe::{ModelConfig, PositionBasis, PositionCombination, PositionCoordinate, PositionResample};
use crate::{Error, Result};

/// The filter that resizes patches: that of FlexiViT in timm.
pub const PATCH_FILTER: PositionResample = PositionResample::Bicubic;

/// Table `[rows·columns, D]` of the grid `from`, row by row, for the grid `to`. The same grid gives the same table.
///
/// # Errors
/// [`Error::Usage`] if a side is 0 or the table is not of its grid.
pub fn resize_table(
    table: &[f32],
    from: [usize; 2],
    to: [usize; 2],
    filter: PositionResample,
) -> Result<Vec<f32>> {
    let count = from[0].checked_mul(from[1]).unwrap_or(0);
    if count == 0 || to.contains(&0) || !table.len().is_multiple_of(count) {
        return Err(Error::usage(format!(
            "a position table of {} values cannot be resampled from {}×{} to {}×{} places",
            table.len(),
            from[0],
            from[1],
            to[0],
            to[1]
        )));
    }
    if from == to {
        return Ok(table.to_vec());
    }
    let rows = resize_matrix(from[0], to[0], filter);
    let columns = resize_matrix(from[1], to[1], filter);
    let width = table.len() / count;
    let resized = separable(table, [1, from[0], from[1], width], [&rows, &columns], to);
    Ok(resized.into_iter().map(|value| value as f32).collect())
}

/// Kernel `[D, channels·from²]` of a patch embedding for patches of side `to`, `[D, channels·to²]`.
///
/// # Errors
/// [`Error::Usage`] if a side is 0, the kernel is not of its patch, or the filter cannot be inverted.
pub fn resize_patch(
    kernel: &[f32],
    channels: usize,
    from: usize,
    to: usize,
    filter: PositionResample,
) -> Result<Vec<f32>> {
    let area = from.checked_mul(from).and_then(|area| area.checked_mul(channels)).unwrap_or(0);
    if area == 0 || to == 0 || !kernel.len().is_multiple_of(area) {
        return Err(Error::usage(format!(
            "a patch embedding of {} values is none of {channels} channels and patches of side {from}, to be resized \
             to {to}",
            kernel.len()
        )));
    }
    if from == to {
        return Ok(kernel.to_vec());
    }
    let inverse = inverse_of_transpose(&resize_matrix(from, to, filter), to, from).ok_or_else(|| {
        Error::usage(format!(
            "patches of side {from} cannot be resized to {to} by this filter: it loses values"
        ))
    })?;
    let planes = kernel.len() / (from * from);
    let resized = separable(kernel, [planes, from, from, 1], [&inverse, &inverse], [to, to]);
    Ok(resized.into_iter().map(|value| value as f32).collect())
}

/// Makes weights of the model `there` fit the grid and the patch of the model `here` where nothing else keeps them from
/// it, and changes `there` accordingly. Rows of prefix tokens are no part of a table and stay as they are. Says what
/// was done; nothing where nothing was.
///
/// Flat and joint tables are resampled, and tables of one axis under fractional coordinates: under absolute ones their
/// rows stand for places that do not move.
///
/// # Errors
/// As [`resize_table`] and [`resize_patch`]; a flat table of one column, which is of a grid that nobody told.
pub fn fit(weights: &mut Weights, there: &mut ModelConfig, here: &ModelConfig) -> Result<Option<String>> {
    let mut told = Vec::new();
    let (from, to) = (there.patch, here.patch);
    if from != to
        && there.channels == here.channels
        && !there.patch_norm_in
        && let Some((shape, kernel)) = weights.tensors.get_mut("patch_embed.weight")
    {
        *kernel = resize_patch(kernel, there.channels, from, to, PATCH_FILTER)?;
        *shape = vec![shape[0], there.channels * to * to];
        there.patch = to;
        told.push(format!("patch embedding from {from}×{from} to {to}×{to} pixels (pseudo-inverse)"));
    }
    let (old, new) = (&mut there.position, &here.position);
    let (from, to) = ([old.rows, old.columns], [new.rows, new.columns]);
    let alike =
        old.basis == new.basis && old.combination == new.combination && old.coordinate == new.coordinate;
    if from != to && alike && new.basis == PositionBasis::Learned {
        let filter = new.resample;
        if new.combination == PositionCombination::Flat && from[1] == 1 && from[0] > 1 && to[1] != 1 {
            return Err(Error::usage(format!(
                "the grid of its table of {} positions is not known; set model.position.rows and \
                 model.position.columns in `trencadis convert`, and start from the file that it writes",
                from[0]
            )));
        }
        let axes: &[(&str, [usize; 2], [usize; 2])] = match new.combination {
            PositionCombination::Flat | PositionCombination::Joint => &[("position.table", from, to)],
            _ if new.coordinate == PositionCoordinate::Absolute => &[],
            _ => &[("position.row", [from[0], 1], [to[0], 1]), ("position.column", [from[1], 1], [to[1], 1])],
        };
        for (name, from, to) in axes {
            if let Some((shape, table)) = weights.tensors.get_mut(*name) {
                *table = resize_table(table, *from, *to, filter)?;
                shape[0] = to[0] * to[1];
                (old.rows, old.columns) = (new.rows, new.columns);
            }
        }
        if [old.rows, old.columns] == to {
            told.push(format!(
                "positions from {}×{} to {}×{} patches ({})",
                from[0],
                from[1],
                to[0],
                to[1],
                name_of(filter)
            ));
        }
    }
    Ok((!told.is_empty()).then(|| told.join(", ")))
}

/// As a recipe names it.
fn name_of(filter: PositionResample) -> String {
    let name = serde_json::to_value(filter);
    name.ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

/// `out[p, i, j, d] = Σ rows[i, y] · columns[j, x] · values[p, y, x, d]` for values `[planes, H, W, D]`.
fn separable(
    values: &[f32],
    [planes, height, width, depth]: [usize; 4],
    [rows, columns]: [&[f64]; 2],
    [to_height, to_width]: [usize; 2],
) -> Vec<f64> {
    let mut half = vec![0.0; planes * to_height * width * depth];
    for (out, plane) in
        half.chunks_exact_mut(to_height * width * depth).zip(values.chunks_exact(height * width * depth))
    {
        for (out, weights) in out.chunks_exact_mut(width * depth).zip(rows.chunks_exact(height)) {
            for (row, &weight) in plane.chunks_exact(width * depth).zip(weights).filter(|(_, w)| **w != 0.0) {
                out.iter_mut().zip(row).for_each(|(out, &value)| *out += weight * f64::from(value));
            }
        }
    }
    let mut whole = vec![0.0; planes * to_height * to_width * depth];
    for (out, line) in whole.chunks_exact_mut(to_width * depth).zip(half.chunks_exact(width * depth)) {
        for (out, weights) in out.chunks_exact_mut(depth).zip(columns.chunks_exact(width)) {
            for (cell, &weight) in line.chunks_exact(depth).zip(weights).filter(|(_, w)| **w != 0.0) {
                out.iter_mut().zip(cell).for_each(|(out, &value)| *out += weight * value);
            }
        }
    }
    whole
}

/// `(Bᵀ)⁺` `[n, m]` of a matrix `B` `[n, m]` of full rank: `(B Bᵀ)⁻¹ B` where it is wide and `B (Bᵀ B)⁻¹` where it is
/// tall. Filters with antialiasing have condition numbers below 4, so that nothing is lost in the products.
fn inverse_of_transpose(b: &[f64], n: usize, m: usize) -> Option<Vec<f64>> {
    let at = |i: usize, j: usize| b[i * m + j];
    let mut inverse = b.to_vec();
    if n <= m {
        let factor = cholesky(n, |i, j| (0..m).map(|k| at(i, k) * at(j, k)).sum())?;
        for j in 0..m {
            let mut column: Vec<f64> = (0..n).map(|i| at(i, j)).collect();
            solve(&factor, &mut column);
            column.iter().enumerate().for_each(|(i, value)| inverse[i * m + j] = *value);
        }
    } else {
        let factor = cholesky(m, |i, j| (0..n).map(|k| at(k, i) * at(k, j)).sum())?;
        inverse.chunks_exact_mut(m).for_each(|row| solve(&factor, row));
    }
    Some(inverse)
}

/// Lower factor `L` `[n, n]` of a positive definite matrix `L Lᵀ`; none where it is not.
fn cholesky(n: usize, matrix: impl Fn(usize, usize) -> f64) -> Option<Vec<f64>> {
    let mut factor = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let known: f64 = (0..j).map(|k| factor[i * n + k] * factor[j * n + k]).sum();
            let rest = matrix(i, j) - known;
            if i != j {
                factor[i * n + j] = rest / factor[j * n + j];
            } else if rest > 1e-10 {
                factor[i * n + i] = rest.sqrt();
            } else {
                return None;
            }
        }
    }
    Some(factor)
}

/// Solves `L Lᵀ x = b` in the place of `b`.
fn solve(factor: &[f64], x: &mut [f64]) {
    let n = x.len();
    for i in 0..n {
        let known: f64 = (0..i).map(|k| factor[i * n + k] * x[k]).sum();
        x[i] = (x[i] - known) / factor[i * n + i];
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|k| factor[k * n + i] * x[k]).sum();
        x[i] = (x[i] - known) / factor[i * n + i];
    }
}
