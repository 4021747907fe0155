//! Sums of whole tensors.

use super::real::Real;

/// `y += x`.
pub fn add<R: Real>(y: &mut [R], x: &[R]) {
    todo!()
}

/// `y[m, D] += row[D]` for every row.
pub fn add_row<R: Real>(y: &mut [R], row: &[R]) {
    for y in y.chunks_exact_mut(row.len()) {
        add(y, row);
    }
}
