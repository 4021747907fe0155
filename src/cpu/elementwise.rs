//! Sums of whole tensors.

use super::real::Real;
use super::simd::{add_assign, for_each, task_len, vectorised};

/// `y += x`.
pub fn add<R: Real>(y: &mut [R], x: &[R]) {
    for_each(y.chunks_mut(task_len(1)).zip(x.chunks(task_len(1))), |(y, x)| {
        vectorised(
            #[inline(always)]
            || add_assign(y, x),
        );
    });
}

/// `y[m, D] += row[D]` for every row.
pub fn add_row<R: Real>(y: &mut [R], row: &[R]) {
    for y in y.chunks_exact_mut(row.len()) {
        add(y, row);
    }
}
