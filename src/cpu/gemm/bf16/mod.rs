//! Products of f32 matrices whose elements are rounded to bf16, summed in f32: the arithmetic of a GPU's tensor cores.
//!
//! Operands are packed into tiles once (`pack`) and multiplied 32 × 32 results at a time (`multiply`) by the units
//! that the machine has ([`Units`]); without any, rounded copies are multiplied in f32. Every sum has one fixed order, so a
//! result is the same bit for bit with any number of threads, and of AMX and AVX-512 does not depend on the other rows and
//! columns. Between units it differs by the order of sums, and by numbers below 2⁻¹²⁶, which AMX and AVX-512 take for 0.

#[cfg(target_arch = "x86_64")]
mod blocks;
#[cfg(target_arch = "x86_64")]
mod multiply;
#[cfg(target_arch = "x86_64")]
mod pack;
mod units;

use std::sync::atomic::{AtomicUsize, Ordering};

pub use units::Units;

use super::matrix::{Mat, MatMut, product};
use crate::cpu::scratch::with_scratch;
use crate::cpu::simd::{for_each, task_len};

/// How many [`InUse`] there are.
static IN_USE: AtomicUsize = AtomicUsize::new(0);

/// As long as one of these lives, [`super::gemm`] of f32 rounds its operands to bf16, on whatever thread: work is handed to
/// others, and ranks that are threads of a process are of one recipe, whose `train.matmul` decides.
#[derive(Debug)]
pub struct InUse(());

impl InUse {
    /// From now on, until it is dropped.
    pub fn begin() -> Self {
        IN_USE.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        IN_USE.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether [`super::gemm`] of f32 rounds its operands to bf16.
pub fn in_use() -> bool {
    IN_USE.load(Ordering::Relaxed) > 0
}

/// `out = (out if accumulate else 0) + scale · a · b` of operands rounded to bf16 (to nearest, ties to even), by units that
/// the machine has; with `parallel` on rayon's threads.
pub(super) fn gemm(
    units: Units,
    out: MatMut<'_, f32>,
    accumulate: bool,
    scale: f32,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    parallel: bool,
) {
    match units {
        #[cfg(target_arch = "x86_64")]
        Units::Amx | Units::Avx512 if blocks::serves(&a) && blocks::serves(&b.t()) => {
            blocks::gemm(units, out, accumulate, scale, a, b, parallel);
        }
        _ => with_scratch([a.rows * a.cols, b.rows * b.cols], |[left, right]| {
            round(left, &a, parallel);
            round(right, &b, parallel);
            let (left, right) =
                (Mat::new(left, a.rows, a.cols, a.cols), Mat::new(right, b.rows, b.cols, b.cols));
            product(out, accumulate, scale, left, right, parallel);
        }),
    }
}

/// Copies a matrix row by row, rounded.
fn round(to: &mut [f32], of: &Mat<'_, f32>, parallel: bool) {
    let width = of.cols.max(1);
    let len = task_len(width);
    let rows = |(task, to): (usize, &mut [f32])| {
        for (i, to) in to.chunks_exact_mut(width).enumerate() {
            let row = &of.data[(task * len / width + i) * of.row_stride..];
            for (j, to) in to.iter_mut().enumerate() {
                *to = half::bf16::from_f32(row[j * of.col_stride]).to_f32();
            }
        }
    };
    let tasks = to.chunks_mut(len).enumerate();
    if parallel { for_each(tasks, rows) } else { tasks.for_each(rows) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    /// All that this machine has.
    fn units() -> &'static [Units] {
        match Units::best() {
            Units::Amx => &[Units::Amx, Units::Avx512, Units::Portable],
            Units::Avx512 => &[Units::Avx512, Units::Portable],
            Units::Portable => &[Units::Portable],
        }
    }

    fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
        (0..len).map(|_| 2.0 * stream.uniform() - 1.0).collect()
    }

    fn rounded(x: &[f32]) -> Vec<f64> {
        x.iter().map(|&x| half::bf16::from_f32(x).to_f64()).collect()
    }

    /// A matrix with rows that lie apart, or the transpose of one.
    fn view<R>(data: &[R], rows: usize, cols: usize, transposed: bool) -> Mat<'_, R> {
        if transposed {
            Mat::new(data, cols, rows, rows + 3).t()
        } else {
            Mat::new(data, rows, cols, cols + 5)
        }
    }

    #[test]
    fn units_agree_with_rounded_operands_in_f64() {
        // The last has several groups of panels and several blocks of the inner dimension.
        for (m, n, k) in
            [(1, 1, 1), (32, 32, 32), (33, 50, 77), (5, 200, 64), (300, 65, 1100), (70, 600, 1100)]
        {
            let len = |rows: usize, cols: usize| (rows + 5) * (cols + 5);
            let (a, b) = (random(len(m, k), 1), random(len(k, n), 2));
            let (wide_a, wide_b) = (rounded(&a), rounded(&b));
            for [left, right] in [[false, false], [false, true], [true, false], [true, true]] {
                let (add, scale) = (left, if right { 0.5 } else { 1.0 });
                let stride = n + 7;
                let start = random(m * stride, 3);
                let mut want: Vec<f64> = start.iter().map(|&x| f64::from(x)).collect();
                let wide = [view(&wide_a, m, k, left), view(&wide_b, k, n, right)];
                product(MatMut::new(&mut want, m, n, stride), add, f64::from(scale), wide[0], wide[1], false);
                let (a, b) = (view(&a, m, k, left), view(&b, k, n, right));
                for &units in units() {
                    let multiply = |parallel| {
                        let mut got = start.clone();
                        gemm(units, MatMut::new(&mut got, m, n, stride), add, scale, a, b, parallel);
                        got
                    };
                    let got = multiply(false);
                    for (i, (&got, &want)) in got.iter().zip(&want).enumerate() {
                        let near = (f64::from(got) - want).abs() < 2e-6 * k as f64 + 1e-6;
                        let right = if i % stride < n { near } else { got == start[i] };
                        assert!(right, "{units:?} {m} {n} {k}, element {i}: {got} and {want}");
                    }
                    for threads in [1, 3] {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                        assert!(pool.install(|| multiply(true)) == got, "{units:?} on {threads} threads");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_bits_wherever_it_stands() {
        let (m, n, k) = (70, 40, 90);
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        for &units in units().iter().filter(|&&units| units != Units::Portable) {
            let multiply = |rows: std::ops::Range<usize>| {
                let mut out = vec![0.0; rows.len() * n];
                let a = Mat::new(&a[rows.start * k..], rows.len(), k, k);
                let to = MatMut::new(&mut out, rows.len(), n, n);
                gemm(units, to, false, 1.0, a, Mat::new(&b, k, n, n), false);
                out
            };
            let (whole, part) = (multiply(0..m), multiply(13..57));
            assert_eq!(whole[13 * n..57 * n], part, "{units:?}");
        }
    }

    #[test]
    fn edges() {
        for &units in units() {
            for parallel in [false, true] {
                let multiply = |out: MatMut<'_, f32>, add, a, b| gemm(units, out, add, 1.0, a, b, parallel);
                // Nothing to sum: zeros, or what was there.
                for (add, want) in [(false, 0.0), (true, 3.0)] {
                    let mut out = [3.0; 6];
                    multiply(
                        MatMut::new(&mut out, 2, 3, 3),
                        add,
                        Mat::new(&[], 2, 0, 0),
                        Mat::new(&[], 0, 3, 3),
                    );
                    assert_eq!(out, [want; 6], "{units:?}");
                }
                multiply(
                    MatMut::new(&mut [], 0, 3, 3),
                    false,
                    Mat::new(&[], 0, 2, 2),
                    Mat::new(&[1.0; 6], 2, 3, 3),
                );
                multiply(
                    MatMut::new(&mut [], 2, 0, 0),
                    false,
                    Mat::new(&[1.0; 4], 2, 2, 2),
                    Mat::new(&[], 2, 0, 0),
                );
                // One row, whose stride is of no account; and what is overwritten may be no number.
                let mut out = [f32::NAN; 2];
                multiply(
                    MatMut::new(&mut out, 1, 2, 1),
                    false,
                    Mat::new(&[1.0, 2.0], 1, 2, 2),
                    Mat::new(&[1.0, 2.0, 3.0, 4.0], 2, 2, 2),
                );
                assert_eq!(out, [7.0, 10.0], "{units:?}");
                // Strides of which none is 1.
                let data = [1.0, 9.0, 2.0, 9.0, 3.0, 9.0, 4.0];
                let apart = Mat { data: &data, rows: 2, cols: 2, row_stride: 4, col_stride: 2 };
                let mut out = [0.0; 4];
                multiply(MatMut::new(&mut out, 2, 2, 2), false, apart, apart);
                assert_eq!(out, [7.0, 10.0, 15.0, 22.0], "{units:?}");
                let mut out = [0.0; 2];
                let b = [f32::INFINITY, f32::NAN];
                multiply(
                    MatMut::new(&mut out, 1, 2, 2),
                    false,
                    Mat::new(&[2.0], 1, 1, 1),
                    Mat::new(&b, 1, 2, 2),
                );
                assert!(out[0] == f32::INFINITY && out[1].is_nan(), "{units:?}: {out:?}");
            }
        }
    }
}
