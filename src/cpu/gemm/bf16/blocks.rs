//! The product in blocks that stay in cache.

use std::ops::Range;

use rayon::current_num_threads;

use super::multiply::{PANEL, Product, Tiles};
use super::pack::{DEPTH, Form, SIDE, Tile, pack};
use super::{Mat, MatMut, Units, for_each, with_scratch};

/// Pairs of tiles along the inner dimension that are multiplied at a time: two panels of this length fit into L1 and L2.
const STEPS: usize = 32;
/// Tiles of the right operand that stay in L2 while the rows of a task pass: 1 MiB.
const COLUMN_TILES: usize = 1024;
/// Panels of the right operand that are packed together.
const PACKED: usize = 8;
/// Most rows of a task: its panels stay in L2.
const MAX_ROWS: usize = 256;

/// Whether these rows of a left operand, or columns of a right one, can be packed: one of the strides is 1.
pub fn serves(mat: &Mat<'_, f32>) -> bool {
    mat.cols > 0 && (mat.row_stride == 1 || mat.col_stride == 1)
}

/// As [`super::gemm`], of operands that [`serve`](serves).
pub fn gemm(
    units: Units,
    out: MatMut<'_, f32>,
    accumulate: bool,
    scale: f32,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    parallel: bool,
) {
    let MatMut { data: out, rows, cols, row_stride } = out;
    if rows == 0 || cols == 0 {
        return;
    }
    let row_stride = if rows == 1 { cols } else { row_stride };
    let out = &mut out[..(rows - 1) * row_stride + cols];
    let (steps, panels, columns) = (a.cols.div_ceil(DEPTH), cols.div_ceil(PANEL), b.t());
    // Several tasks a thread, so that none waits long for the last; results do not depend on it.
    let share = if parallel { rows.div_ceil(4 * current_num_threads()) } else { rows };
    let task_rows = share.clamp(1, MAX_ROWS).next_multiple_of(PANEL);
    let multiply = |task: usize, out: &mut [f32], right: &[Tile]| {
        let first = task * task_rows;
        let product = Product { scale, add: accumulate, row_stride, cols };
        rows_of(units, out, &product, &a, first..rows.min(first + task_rows), right);
    };
    with_scratch([2 * panels * steps], |[right]| {
        let blocks = right.chunks_mut(2 * panels * STEPS).enumerate().flat_map(|(block, to)| {
            let len = to.len() / panels;
            let groups = to.chunks_mut(PACKED * len).enumerate();
            groups.map(move |(group, to)| (to, len, group * PACKED * PANEL, block * STEPS * DEPTH))
        });
        let pack = |(to, len, outer, inner): (&mut [Tile], usize, usize, usize)| {
            pack_panels(to, len, &columns, Form::Right, outer, inner);
        };
        if parallel {
            for_each(blocks, pack)
        } else {
            blocks.for_each(pack)
        }
        let tasks = out.chunks_mut(task_rows * row_stride).enumerate();
        let right = &*right;
        if parallel {
            for_each(tasks, |(task, out)| multiply(task, out, right));
        } else {
            tasks.for_each(|(task, out)| multiply(task, out, right));
        }
    });
}

/// The rows `rows` of the product with packed columns: of every [`STEPS`] of the inner dimension all panels.
fn rows_of(
    units: Units,
    out: &mut [f32],
    product: &Product,
    a: &Mat<'_, f32>,
    rows: Range<usize>,
    right: &[Tile],
) {
    // SAFETY: these units are what `Units` found here; nothing below hands work to this or another thread.
    let tiles = (units == Units::Amx).then(|| unsafe { Tiles::new() });
    let (panels, columns) = (rows.len().div_ceil(PANEL), product.cols.div_ceil(PANEL));
    with_scratch([2 * panels * STEPS.min(a.cols.div_ceil(DEPTH))], |[left]| {
        for (block, right) in right.chunks(2 * columns * STEPS).enumerate() {
            let len = right.len() / columns;
            let left = &mut left[..panels * len];
            pack_panels(left, len, a, Form::Left, rows.start, block * STEPS * DEPTH);
            let product = Product { add: product.add || block > 0, ..*product };
            // Row by row of panels, so that results are written along their rows.
            let some = (COLUMN_TILES / len).max(1);
            for (group, right) in right.chunks(some * len).enumerate() {
                for (i, left) in left.chunks_exact(len).enumerate() {
                    let (out, rows) = (&mut out[i * PANEL * product.row_stride..], rows.len() - i * PANEL);
                    for (j, right) in right.chunks_exact(len).enumerate() {
                        let col = (group * some + j) * PANEL;
                        // SAFETY: these units are what `Units` found here.
                        unsafe { product.square(tiles.as_ref(), out, rows, col, left, right) };
                    }
                }
            }
        }
    });
}

/// Packs panels of `len` tiles each: the rows of a matrix from `outer` on, from column `inner` on.
fn pack_panels(to: &mut [Tile], len: usize, of: &Mat<'_, f32>, form: Form, outer: usize, inner: usize) {
    let (panels, steps) = (to.len() / len, len / 2);
    let mut pair = |panel: usize, step: usize| {
        for half in 0..2 {
            let (outer, inner) = (outer + panel * PANEL + half * SIDE, inner + step * DEPTH);
            // SAFETY: AVX-512 with bf16 is among what `Units` asks for.
            unsafe { pack(&mut to[panel * len + 2 * step + half], of, form, outer, inner) };
        }
    };
    // Along what lies together in memory.
    if of.col_stride == 1 {
        (0..panels).for_each(|panel| (0..steps).for_each(|step| pair(panel, step)));
    } else {
        (0..steps).for_each(|step| (0..panels).for_each(|panel| pair(panel, step)));
    }
}
