//! Position embeddings: learned or fixed tables read with interpolation weights, and Fourier maps.

pub mod rope;

use rayon::prelude::*;

use super::real::Real;
use super::scratch::with_scratch;
use super::simd::{LANES, add_scaled, task_rows, vectorised};

/// For every token and axis the table rows that it reads and their weights: token `t` reads
/// `index[start[t]..start[t+1]]`. An absolute coordinate is one entry of weight 1, a resampled
/// table several; prefix tokens have none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Taps {
    /// `[T+1]`.
    pub start: Vec<u32>,
    /// Table rows.
    pub index: Vec<u32>,
    /// Their weights.
    pub weight: Vec<f32>,
}

/// How the row part and the column part become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    /// One table of width D: `Σ w·table[i]`.
    Single,
    /// Two tables of width D, added.
    Sum,
    /// Two tables of width D/2, side by side (row part first).
    Stack,
    /// Two tables of width D, multiplied.
    Product,
}

impl Taps {
    /// Rows and weights that token `t` reads.
    #[inline(always)]
    fn of_token(&self, t: usize) -> impl Iterator<Item = (usize, f32)> {
        let range = self.start[t] as usize..self.start[t + 1] as usize;
        self.index[range.clone()].iter().map(|&i| i as usize).zip(self.weight[range].iter().copied())
    }

    /// Tokens and weights that read each of `rows` table rows, tokens in order: entries
    /// `start[i]..start[i + 1]` belong to row `i`.
    fn by_row(&self, rows: usize) -> (Vec<u32>, Vec<(u32, f32)>) {
        let mut start = vec![0u32; rows + 1];
        for &index in &self.index {
            start[index as usize + 1] += 1;
        }
        for i in 0..rows {
            start[i + 1] += start[i];
        }
        let mut next = start.clone();
        let mut entries = vec![(0, 0.0); self.index.len()];
        for token in 0..self.start.len().saturating_sub(1) {
            for (row, weight) in self.of_token(token) {
                entries[next[row] as usize] = (token as u32, weight);
                next[row] += 1;
            }
        }
        (start, entries)
    }
}

/// Writes `out[T, D]`. `tables` and `taps` hold one entry for [`Combine::Single`], else (row, column).
pub fn table_forward<R: Real>(
    out: &mut [R],
    tables: &[&[R]],
    taps: &[&Taps],
    combine: Combine,
    width: usize,
) {
    let tokens = task_rows(width);
    out.par_chunks_mut(tokens * width).enumerate().for_each(|(task, out)| {
        with_scratch([width], |[other]| {
            vectorised(
                #[inline(always)]
                || {
                    for (t, out) in out.chunks_exact_mut(width).enumerate() {
                        let t = task * tokens + t;
                        match combine {
                            Combine::Single => read(out, tables[0], taps[0], t),
                            Combine::Sum => {
                                read(out, tables[0], taps[0], t);
                                add_read(out, tables[1], taps[1], t);
                            }
                            Combine::Stack => {
                                let (row, column) = out.split_at_mut(width / 2);
                                read(row, tables[0], taps[0], t);
                                read(column, tables[1], taps[1], t);
                            }
                            Combine::Product => {
                                read(out, tables[0], taps[0], t);
                                read(other, tables[1], taps[1], t);
                                for (out, &other) in out.iter_mut().zip(other.iter()) {
                                    *out *= other;
                                }
                            }
                        }
                    }
                },
            );
        });
    });
}

/// Adds the tables' gradients, in token order for every table row.
pub fn table_backward<R: Real>(
    dtables: &mut [Option<&mut [R]>],
    dout: &[R],
    tables: &[&[R]],
    taps: &[&Taps],
    combine: Combine,
    width: usize,
) {
    let columns = if combine == Combine::Stack { width / 2 } else { width };
    for (axis, dtable) in dtables.iter_mut().enumerate() {
        let Some(dtable) = dtable else { continue };
        let (start, entries) = taps[axis].by_row(dtable.len() / columns);
        let first = if combine == Combine::Stack { axis * columns } else { 0 };
        dtable.par_chunks_exact_mut(columns).enumerate().for_each(|(row, drow)| {
            let entries = &entries[start[row] as usize..start[row + 1] as usize];
            with_scratch([columns], |[other]| {
                vectorised(
                    #[inline(always)]
                    || {
                        for &(token, weight) in entries {
                            let weight = R::of(f64::from(weight));
                            let dout = &dout[token as usize * width + first..][..columns];
                            if combine == Combine::Product {
                                read(other, tables[1 - axis], taps[1 - axis], token as usize);
                                for ((d, &dout), &other) in drow.iter_mut().zip(dout).zip(other.iter()) {
                                    *d = (weight * dout).mul_add(other, *d);
                                }
                            } else {
                                add_scaled(drow, weight, dout);
                            }
                        }
                    },
                );
            });
        });
    }
}

/// `out = Σ w·table[i]` over the taps of token `t`.
#[inline(always)]
fn read<R: Real>(out: &mut [R], table: &[R], taps: &Taps, t: usize) {
    out.fill(R::ZERO);
    add_read(out, table, taps, t);
}

/// `out += Σ w·table[i]` over the taps of token `t`.
#[inline(always)]
fn add_read<R: Real>(out: &mut [R], table: &[R], taps: &Taps, t: usize) {
    let width = out.len();
    for (row, weight) in taps.of_token(t) {
        add_scaled(out, R::of(f64::from(weight)), &table[row * width..][..width]);
    }
}

/// Fourier features (Tancik et al. 2020): `out[t] = [sin(2π B p) | cos(2π B p)]` with
/// `p = coordinates[t] = (y, x)` and `map[D/2, 2] = B`; prefix tokens (NaN coordinates) give zeros.
pub fn fourier_forward<R: Real>(out: &mut [R], map: &[R], coordinates: &[[f32; 2]], width: usize) {
    let tokens = task_rows(width);
    out.par_chunks_mut(tokens * width).zip(coordinates.par_chunks(tokens)).for_each(|(out, points)| {
        vectorised(
            #[inline(always)]
            || {
                for (out, &point) in out.chunks_exact_mut(width).zip(points) {
                    let Some((y, x)) = in_grid(point) else {
                        out.fill(R::ZERO);
                        continue;
                    };
                    let (sines, cosines) = out.split_at_mut(width / 2);
                    let (rows, _) = map.as_chunks::<2>();
                    // By way of arrays: a loop that writes two slices of unknown length is not vectorised.
                    for ((sines, cosines), rows) in
                        sines.chunks_mut(LANES).zip(cosines.chunks_mut(LANES)).zip(rows.chunks(LANES))
                    {
                        let (mut phase, mut sine, mut cosine) =
                            ([R::ZERO; LANES], [R::ZERO; LANES], [R::ZERO; LANES]);
                        for (phase, row) in phase.iter_mut().zip(rows) {
                            *phase = row[0].mul_add(y, row[1] * x);
                        }
                        for i in 0..LANES {
                            (sine[i], cosine[i]) = phase[i].sin_cos_turns();
                        }
                        sines.copy_from_slice(&sine[..sines.len()]);
                        cosines.copy_from_slice(&cosine[..cosines.len()]);
                    }
                }
            },
        );
    });
}

/// `dmap +=` its gradient, in token order.
pub fn fourier_backward<R: Real>(
    dmap: &mut [R],
    dout: &[R],
    map: &[R],
    coordinates: &[[f32; 2]],
    width: usize,
) {
    /// Rows of the map that one task owns: a few cache lines of `dout`.
    const ROWS: usize = 64;
    let tau = R::of(std::f64::consts::TAU);
    dmap.par_chunks_mut(2 * ROWS).zip(map.par_chunks(2 * ROWS)).enumerate().for_each(
        |(task, (dmap, map))| {
            let ((drows, _), (rows, _)) = (dmap.as_chunks_mut::<2>(), map.as_chunks::<2>());
            let first = task * ROWS;
            vectorised(
                #[inline(always)]
                || {
                    for (dout, &point) in dout.chunks_exact(width).zip(coordinates) {
                        let Some((y, x)) = in_grid(point) else { continue };
                        let (dsines, dcosines) = dout.split_at(width / 2);
                        let douts = dsines[first..].iter().zip(&dcosines[first..]);
                        for ((drow, row), (&dsine, &dcosine)) in drows.iter_mut().zip(rows).zip(douts) {
                            let (sine, cosine) = (row[0].mul_add(y, row[1] * x)).sin_cos_turns();
                            let dphase = tau * (dsine * cosine - dcosine * sine);
                            drow[0] = dphase.mul_add(y, drow[0]);
                            drow[1] = dphase.mul_add(x, drow[1]);
                        }
                    }
                },
            );
        },
    );
}

/// The coordinates (y, x) of a token; none for a prefix token.
#[inline(always)]
fn in_grid<R: Real>([y, x]: [f32; 2]) -> Option<(R, R)> {
    (!y.is_nan()).then(|| (R::of(f64::from(y)), R::of(f64::from(x))))
}
