//! The table of the rotary position embedding: cos and sin of what [`RopeConfig`] says.

use std::f64::consts::TAU;

use rayon::prelude::*;

use crate::cpu::attention::take_front;
use crate::cpu::real::Real;
use crate::data::batch::PREFIX;
use crate::ops::{RopeConfig, RopePair};

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
    let pairs = config.pairs(head_dim);
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
    pairs: &[RopePair],
    out: &mut [R],
    positions: &[[u16; 2]],
    grid: [u16; 2],
) {
    let axes = [0, 1].map(|axis| {
        let of_axis = pairs.iter().filter(|pair| pair.axis == axis);
        let angles = (0..grid[axis]).flat_map(|index| {
            let [numerator, denominator] = config.coordinate_of(axis, index, grid);
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
