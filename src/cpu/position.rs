//! Position embeddings: learned or fixed tables read with interpolation weights, and Fourier maps.

use super::real::Real;

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

/// Writes `out[T, D]`. `tables` and `taps` hold one entry for [`Combine::Single`], else (row, column).
pub fn table_forward<R: Real>(
    out: &mut [R],
    tables: &[&[R]],
    taps: &[&Taps],
    combine: Combine,
    width: usize,
) {
    todo!()
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
    todo!()
}

/// Fourier features (Tancik et al. 2020): `out[t] = [sin(2π B p) | cos(2π B p)]` with
/// `p = coordinates[t] = (y, x)` and `map[D/2, 2] = B`; prefix tokens (NaN coordinates) give zeros.
pub fn fourier_forward<R: Real>(out: &mut [R], map: &[R], coordinates: &[[f32; 2]], width: usize) {
    todo!()
}

/// `dmap +=` its gradient.
pub fn fourier_backward<R: Real>(
    dmap: &mut [R],
    dout: &[R],
    map: &[R],
    coordinates: &[[f32; 2]],
    width: usize,
) {
    todo!()
}
