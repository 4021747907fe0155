//! Loops for the machine's vector instructions, sums in a fixed order, and rows split over threads.
//!
//! The crate is compiled for the baseline of its architecture; [`vectorised`] compiles a closure
//! once more for AVX2 and for AVX-512 and picks at run time.

use rayon::prelude::*;

use super::real::Real;

/// Number of running sums of [`sum_by`] and [`sum2_by`]: fixed, so that a sum has the same order
/// on every machine, and enough to fill a 512-bit register.
pub const LANES: usize = 16;

/// Elements of one task: large against the cost of handing it to a thread (a few microseconds),
/// small enough for L2.
const TASK: usize = 16 * 1024;

/// Runs `f` compiled for the widest vector instructions of this machine. Write the closure as
/// `#[inline(always)] || ...` and mark what it calls `#[inline(always)]`: only inlined code
/// is compiled for those instructions.
#[inline(always)]
pub fn vectorised<T>(f: impl FnOnce() -> T) -> T {
    pulp::Arch::new().dispatch(f)
}

/// Adds the lanes pairwise.
#[inline(always)]
fn fold<R: Real>(mut lanes: [R; LANES]) -> R {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Σ f(x[i]), in [`LANES`] running sums.
#[inline(always)]
pub fn sum_by<T: Copy, R: Real>(x: &[T], f: impl Fn(T) -> R) -> R {
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut lanes = [R::ZERO; LANES];
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane += f(x);
    }
    fold(lanes)
}

/// Σ f(x[i], y[i]) over the shorter of the two, in [`LANES`] running sums.
#[inline(always)]
pub fn sum2_by<R: Real>(x: &[R], y: &[R], f: impl Fn(R, R) -> R) -> R {
    let n = x.len().min(y.len());
    let ((x_blocks, x_tail), (y_blocks, y_tail)) = (x[..n].as_chunks::<LANES>(), y[..n].as_chunks::<LANES>());
    let mut lanes = [R::ZERO; LANES];
    for (x, y) in x_blocks.iter().zip(y_blocks) {
        for ((lane, &x), &y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += f(x, y);
        }
    }
    for ((lane, &x), &y) in lanes.iter_mut().zip(x_tail).zip(y_tail) {
        *lane += f(x, y);
    }
    fold(lanes)
}

/// The largest element, NaN if there is one; `None` for an empty slice.
#[inline(always)]
pub fn largest<R: Real>(x: &[R]) -> Option<R> {
    let first = *x.first()?;
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut lanes = [first; LANES];
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = lane.max(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane = lane.max(x);
    }
    Some(lanes.into_iter().fold(first, R::max))
}

/// `y[i] += x[i]`.
#[inline(always)]
pub fn add_assign<R: Real>(y: &mut [R], x: &[R]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// `y[i] += a x[i]`.
#[inline(always)]
pub fn add_scaled<R: Real>(y: &mut [R], a: R, x: &[R]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = a.mul_add(x, *y);
    }
}

/// Rows of `width` that make one task; at least 1, and independent of the number of threads.
pub fn task_rows(width: usize) -> usize {
    (TASK / width.max(1)).max(1)
}

/// Elements of one task of whole rows of `width`: the argument for `chunks`.
pub fn task_len(width: usize) -> usize {
    task_rows(width) * width.max(1)
}

/// Runs the tasks, on rayon's threads if there is more than one.
pub fn for_each<T: Send>(tasks: impl Iterator<Item = T>, f: impl Fn(T) + Send + Sync) {
    let tasks: Vec<T> = tasks.collect();
    if tasks.len() <= 1 {
        tasks.into_iter().for_each(f);
    } else {
        tasks.into_par_iter().for_each(f);
    }
}

/// Results of the tasks in their order, on rayon's threads if there is more than one.
pub fn map<T: Send, U: Send>(tasks: impl Iterator<Item = T>, f: impl Fn(T) -> U + Send + Sync) -> Vec<U> {
    let tasks: Vec<T> = tasks.collect();
    if tasks.len() <= 1 { tasks.into_iter().map(f).collect() } else { tasks.into_par_iter().map(f).collect() }
}
