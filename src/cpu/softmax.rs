//! Softmax of rows of scores, whole vectors at a time.
//!
//! Rows are padded to a multiple of [`LANES`]: with a tail of unknown length the running sums
//! of a row would live in memory rather than in a register.

use crate::cpu::real::Real;
use crate::cpu::simd::{LANES, fold, vectorised};

/// Length of a row of `keys` scores with its padding.
pub(crate) fn padded(keys: usize) -> usize {
    keys.next_multiple_of(LANES)
}

/// Turns the first `keys` scores of a padded row into `exp(score − max)` and the padding into
/// zeros; returns the maximum and the sum.
#[inline(always)]
pub(crate) fn exp_row<R: Real>(row: &mut [R], keys: usize) -> (R, R) {
    let (row, _) = row.as_chunks_mut::<LANES>();
    let valid = (keys + LANES - 1) % LANES + 1;
    if let Some(last) = row.last_mut() {
        for (i, x) in last.iter_mut().enumerate() {
            *x = if i < valid { *x } else { R::of(f64::NEG_INFINITY) };
        }
    }
    // A NaN may be passed over here: the sum has it.
    let larger = |a: R, b: R| if a > b { a } else { b };
    let mut lanes = [R::of(f64::NEG_INFINITY); LANES];
    for block in row.iter() {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = larger(x, *lane);
        }
    }
    let max = fold(lanes, larger);
    let mut lanes = [R::ZERO; LANES];
    for block in row {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *x = (*x - max).exp();
            *lane += *x;
        }
    }
    (max, fold(lanes, |a, b| a + b))
}

/// Turns the first `keys` scores of a padded row into their softmax and the padding into zeros; returns the largest
/// score.
pub(crate) fn softmax_row<R: Real>(row: &mut [R], keys: usize) -> R {
    vectorised(
        #[inline(always)]
        || {
            let (max, sum) = exp_row(row, keys);
            let factor = R::ONE / sum;
            for x in row {
                *x *= factor;
            }
            max
        },
    )
}

/// Replaces scores by `p = exp(score − lse)` and dP by `p·(dP − delta)`, in padded rows whose
/// padding may hold anything.
#[inline(always)]
pub(crate) fn exp_grad_row<R: Real>(p: &mut [R], dp: &mut [R], lse: R, delta: R) {
    let ((p, _), (dp, _)) = (p.as_chunks_mut::<LANES>(), dp.as_chunks_mut::<LANES>());
    for (p, dp) in p.iter_mut().zip(dp) {
        for (p, dp) in p.iter_mut().zip(dp) {
            *p = (*p - lse).exp();
            *dp = *p * (*dp - delta);
        }
    }
}
