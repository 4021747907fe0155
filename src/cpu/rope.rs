//! Angles of the rotary position embedding.
//!
//! Every pair of columns of a head turns by the row or by the column of a patch in its grid. Its angle is the
//! coordinate of the patch, a quotient of two integers where `offset` is one, times the frequency of the pair:
//! [`pairs`] and [`coordinate`] tell both, on the CPU and for the kernels.

use std::f64::consts::TAU;

use rayon::prelude::*;

use super::attention::take_front;
use super::real::Real;
use crate::data::batch::PREFIX;
use crate::ops::{RopeConfig, RopeCoordinate};
pub use crate::ops::{RopePairing as Pair, rope_pairs as pairs};

/// Numerator and denominator of the coordinate of index `index` on `axis` of a grid.
pub fn coordinate(config: &RopeConfig, axis: usize, index: u16, grid: [u16; 2]) -> [f64; 2] {
    let [index, side] = [index, grid[axis]].map(f64::from);
    let centred = |side: f64| [2.0 * (index + config.offset) + 1.0 - side, side];
    match config.coordinate {
        RopeCoordinate::Absolute => [index + config.offset, 1.0],
        RopeCoordinate::Fractional => [index + config.offset, side],
        RopeCoordinate::Centered => centred(side),
        RopeCoordinate::CenteredLonger => centred(grid[0].max(grid[1]).into()),
        RopeCoordinate::CenteredShorter => centred(grid[0].min(grid[1]).into()),
        RopeCoordinate::Ends if side <= 1.0 => [-1.0, 1.0],
        RopeCoordinate::Ends => [2.0 * index - (side - 1.0), side - 1.0],
    }
}

/// Writes `[T, head_dim / 2, 2]`, cos and sin of the angle of each live token and pair; of prefix tokens 1 and 0.
/// `positions` and `grids` are those of a [`PackedBatch`](crate::data::batch::PackedBatch), `cu_seqlens` its
/// `images + 1` used entries.
pub fn table<R: Real>(
    config: &RopeConfig,
    head_dim: usize,
    out: &mut [R],
    positions: &[[u16; 2]],
    cu_seqlens: &[i32],
    grids: &[[u16; 2]],
) {
    let pairs = pairs(config, head_dim);
    let (mut rest, mut images) = (out, Vec::new());
    for (image, &grid) in cu_seqlens.windows(2).zip(grids) {
        let tokens = image[0] as usize..image[1] as usize;
        images.push((take_front(&mut rest, tokens.len() * head_dim), tokens, grid));
    }
    images.into_par_iter().for_each(|(out, tokens, grid)| {
        image_table(config, &pairs, out, &positions[tokens], grid);
    });
}

/// Many tokens share a row or a column, so each index of an axis has its angles made once.
fn image_table<R: Real>(
    config: &RopeConfig,
    pairs: &[Pair],
    out: &mut [R],
    positions: &[[u16; 2]],
    grid: [u16; 2],
) {
    let axes = [0, 1].map(|axis| {
        let of_axis = pairs.iter().filter(|pair| pair.axis == axis);
        let angles = (0..grid[axis]).flat_map(|index| {
            let [numerator, denominator] = coordinate(config, axis, index, grid);
            let coordinate = numerator / denominator;
            of_axis.clone().map(move |pair| {
                let (sin, cos) = (TAU * (coordinate * pair.turns)).sin_cos();
                [R::of(cos), R::of(sin)]
            })
        });
        angles.collect::<Vec<_>>()
    });
    let count = pairs.len() / 2;
    for (row, position) in out.as_chunks_mut::<2>().0.chunks_exact_mut(pairs.len()).zip(positions) {
        if *position == PREFIX {
            row.fill([R::ONE, R::ZERO]);
            continue;
        }
        let mut angles = [0, 1].map(|axis| axes[axis][usize::from(position[axis]) * count..][..count].iter());
        for (value, pair) in row.iter_mut().zip(pairs) {
            *value = *angles[pair.axis].next().expect("half the pairs are of each axis");
        }
    }
}
