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
/// `#[inline(always)] || ...` and mark what it calls `#[inline(always)]`, closures with
/// costly bodies included: only inlined code is compiled for those instructions.
#[inline(always)]
pub fn vectorised<T>(f: impl FnOnce() -> T) -> T {
    pulp::Arch::new().dispatch(f)
}

/// Joins the lanes pairwise; unrolled by hand, because a loop over halves goes through memory.
#[inline(always)]
pub(crate) fn fold<R: Real>(lanes: [R; LANES], join: impl Fn(R, R) -> R) -> R {
    #[inline(always)]
    fn halve<R: Real, const N: usize, const HALF: usize>(x: [R; N], join: impl Fn(R, R) -> R) -> [R; HALF] {
        std::array::from_fn(|i| join(x[i], x[i + HALF]))
    }
    let x: [R; LANES / 2] = halve(lanes, &join);
    let x: [R; LANES / 4] = halve(x, &join);
    let x: [R; LANES / 8] = halve(x, &join);
    join(x[0], x[1])
}

/// A block of which `tail` is the beginning. Sums take the tail as a masked block: running sums that
/// are indexed up to an unknown length would live in memory rather than in a register.
#[inline(always)]
fn block_of<T: Copy>(tail: &[T]) -> Option<[T; LANES]> {
    let mut block = [*tail.first()?; LANES];
    block[..tail.len()].copy_from_slice(tail);
    Some(block)
}

/// Σ `f(x[i])`, in [`LANES`] running sums.
#[inline(always)]
pub fn sum_by<T: Copy, R: Real>(x: &[T], f: impl Fn(T) -> R) -> R {
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut lanes = [R::ZERO; LANES];
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane += f(x);
        }
    }
    if let Some(block) = block_of(tail) {
        for (i, (lane, x)) in lanes.iter_mut().zip(block).enumerate() {
            *lane += if i < tail.len() { f(x) } else { R::ZERO };
        }
    }
    fold(lanes, |a, b| a + b)
}

/// Σ `f(x[i], y[i])` over the shorter of the two, in [`LANES`] running sums.
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
    if let (Some(x), Some(y)) = (block_of(x_tail), block_of(y_tail)) {
        for (i, ((lane, x), y)) in lanes.iter_mut().zip(x).zip(y).enumerate() {
            *lane += if i < x_tail.len() { f(x, y) } else { R::ZERO };
        }
    }
    fold(lanes, |a, b| a + b)
}

/// The largest element; `None` for an empty slice. NaN is passed over, or kept if it comes first:
/// what keeps it everywhere does not compile to one instruction.
#[inline(always)]
pub fn largest<R: Real>(x: &[R]) -> Option<R> {
    let first = *x.first()?;
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut lanes = [first; LANES];
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = larger(*lane, x);
        }
    }
    if let Some(block) = block_of(tail) {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane = larger(*lane, x);
        }
    }
    Some(fold(lanes, larger))
}

#[inline(always)]
fn larger<R: Real>(a: R, b: R) -> R {
    if b > a { b } else { a }
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
