//! Linear layers: matrix products, bias and GELU around them.
//!
//! Weights are `[out, in]` as in PyTorch: `y = x wᵀ + b`.

pub mod bf16;
mod matrix;

pub use matrix::{Mat, MatMut, gemm};

use super::real::Real;
use super::simd::{add_assign, for_each, map, task_len, vectorised};
use crate::recipe::GeluKind;

/// Number of rows of `width` in a slice of `len`; 0 for width 0.
fn rows(len: usize, width: usize) -> usize {
    len.checked_div(width).unwrap_or(0)
}

/// `y[m, out] = x[m, in] · w[out, in]ᵀ + bias[out]`.
pub fn linear<R: Real>(y: &mut [R], x: &[R], w: &[R], bias: Option<&[R]>, inner: usize, outer: usize) {
    product(y, x, w, inner, outer);
    if let Some(bias) = bias {
        for_each(y.chunks_mut(task_len(outer)), |y| {
            vectorised(
                #[inline(always)]
                || y.chunks_exact_mut(outer).for_each(|y| add_assign(y, bias)),
            );
        });
    }
}

/// `y = x wᵀ`, in one call: GEMM packs `w` once, which costs more than a pass over `y` that is no
/// longer in cache.
fn product<R: Real>(y: &mut [R], x: &[R], w: &[R], inner: usize, outer: usize) {
    let m = rows(y.len(), outer);
    let (x, w) = (Mat::new(x, m, inner, inner), Mat::new(w, outer, inner, inner));
    gemm(MatMut::new(y, m, outer, outer), false, R::ONE, x, w.t(), true);
}

/// `dx[m, in] = dy[m, out] · w[out, in]`.
pub fn linear_input_grad<R: Real>(dx: &mut [R], dy: &[R], w: &[R], inner: usize, outer: usize) {
    let m = rows(dx.len(), inner);
    gemm(
        MatMut::new(dx, m, inner, inner),
        false,
        R::ONE,
        Mat::new(dy, m, outer, outer),
        Mat::new(w, outer, inner, inner),
        true,
    );
}

/// `dw[out, in] += dyᵀ[out, m] · x[m, in]`.
pub fn linear_weight_grad<R: Real>(dw: &mut [R], dy: &[R], x: &[R], inner: usize, outer: usize) {
    let m = rows(dy.len(), outer);
    gemm(
        MatMut::new(dw, outer, inner, inner),
        true,
        R::ONE,
        Mat::new(dy, m, outer, outer).t(),
        Mat::new(x, m, inner, inner),
        true,
    );
}

/// `db[n] += Σ_rows dy[rows, n]`.
pub fn bias_grad<R: Real>(db: &mut [R], dy: &[R]) {
    let n = db.len();
    if n == 0 {
        return;
    }
    let partials = map(dy.chunks(task_len(n)), |dy| {
        let mut sum = vec![R::ZERO; n];
        vectorised(
            #[inline(always)]
            || dy.chunks_exact(n).for_each(|dy| add_assign(&mut sum, dy)),
        );
        sum
    });
    for partial in partials {
        add_assign(db, &partial);
    }
}

/// `x Φ(x)`, or its approximation by tanh (Hendrycks & Gimpel 2016).
#[inline(always)]
fn gelu_of<R: Real>(x: R, kind: GeluKind) -> R {
    let half = R::of(0.5);
    let t = match kind {
        GeluKind::Erf => (x * R::of(std::f64::consts::FRAC_1_SQRT_2)).erf(),
        GeluKind::Tanh => (x * (x * x).mul_add(R::of(SQRT_2_OVER_PI * CUBIC), R::of(SQRT_2_OVER_PI))).tanh(),
    };
    let half_x = half * x;
    half_x.mul_add(t, half_x)
}

/// Derivative of [`gelu_of`]: `Φ(x) + x φ(x)`, or that of the tanh formula.
#[inline(always)]
fn gelu_slope<R: Real>(x: R, kind: GeluKind) -> R {
    let half = R::of(0.5);
    let x2 = x * x;
    match kind {
        GeluKind::Erf => {
            let cdf = half.mul_add((x * R::of(std::f64::consts::FRAC_1_SQRT_2)).erf(), half);
            let density = (x2 * R::of(-0.5)).exp() * R::of(INV_SQRT_2_PI);
            x.mul_add(density, cdf)
        }
        GeluKind::Tanh => {
            let t = (x * x2.mul_add(R::of(SQRT_2_OVER_PI * CUBIC), R::of(SQRT_2_OVER_PI))).tanh();
            let du = x2.mul_add(R::of(3.0 * SQRT_2_OVER_PI * CUBIC), R::of(SQRT_2_OVER_PI));
            half * (x * du * (R::ONE - t * t) + t + R::ONE)
        }
    }
}

const SQRT_2_OVER_PI: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
const INV_SQRT_2_PI: f64 = 0.5 * SQRT_2_OVER_PI;
const CUBIC: f64 = 0.044715;

/// [`gelu_of`] elementwise; the kind is settled outside the loop.
#[inline(always)]
fn gelu_row<R: Real>(y: &mut [R], x: &[R], kind: GeluKind) {
    match kind {
        GeluKind::Erf => {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = gelu_of(x, GeluKind::Erf);
            }
        }
        GeluKind::Tanh => {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = gelu_of(x, GeluKind::Tanh);
            }
        }
    }
}

/// `y = gelu(x)` elementwise.
pub fn gelu<R: Real>(y: &mut [R], x: &[R], kind: GeluKind) {
    for_each(y.chunks_mut(task_len(1)).zip(x.chunks(task_len(1))), |(y, x)| {
        vectorised(
            #[inline(always)]
            || gelu_row(y, x, kind),
        );
    });
}

/// `dx *= gelu'(x)` elementwise, where `dx` holds the gradient of the result.
pub fn gelu_grad<R: Real>(dx: &mut [R], x: &[R], kind: GeluKind) {
    for_each(dx.chunks_mut(task_len(1)).zip(x.chunks(task_len(1))), |(dx, x)| {
        vectorised(
            #[inline(always)]
            || match kind {
                GeluKind::Erf => {
                    for (d, &x) in dx.iter_mut().zip(x) {
                        *d *= gelu_slope(x, GeluKind::Erf);
                    }
                }
                GeluKind::Tanh => {
                    for (d, &x) in dx.iter_mut().zip(x) {
                        *d *= gelu_slope(x, GeluKind::Tanh);
                    }
                }
            },
        );
    });
}

/// `y = gelu(pre)` with `pre = x wᵀ + bias`; `pre` is written where it is wanted for the backward pass.
#[allow(clippy::too_many_arguments)]
pub fn linear_gelu<R: Real>(
    y: &mut [R],
    pre: Option<&mut [R]>,
    x: &[R],
    w: &[R],
    bias: Option<&[R]>,
    inner: usize,
    outer: usize,
    kind: GeluKind,
) {
    let len = task_len(outer);
    match pre {
        Some(pre) => {
            product(pre, x, w, inner, outer);
            for_each(y.chunks_mut(len).zip(pre.chunks_mut(len)), |(y, pre)| {
                bias_gelu(y, pre, bias, outer, kind);
            });
        }
        None => {
            product(y, x, w, inner, outer);
            for_each(y.chunks_mut(len), |y| bias_gelu_in_place(y, bias, outer, kind));
        }
    }
}

/// `pre += bias`, `y = gelu(pre)`, row by row.
fn bias_gelu<R: Real>(y: &mut [R], pre: &mut [R], bias: Option<&[R]>, width: usize, kind: GeluKind) {
    vectorised(
        #[inline(always)]
        || {
            for (y, pre) in y.chunks_exact_mut(width).zip(pre.chunks_exact_mut(width)) {
                if let Some(bias) = bias {
                    add_assign(pre, bias);
                }
                gelu_row(y, pre, kind);
            }
        },
    );
}

/// `y = gelu(y + bias)`, row by row.
fn bias_gelu_in_place<R: Real>(y: &mut [R], bias: Option<&[R]>, width: usize, kind: GeluKind) {
    vectorised(
        #[inline(always)]
        || {
            for y in y.chunks_exact_mut(width) {
                if let Some(bias) = bias {
                    add_assign(y, bias);
                }
                match kind {
                    GeluKind::Erf => {
                        for y in y {
                            *y = gelu_of(*y, GeluKind::Erf);
                        }
                    }
                    GeluKind::Tanh => {
                        for y in y {
                            *y = gelu_of(*y, GeluKind::Tanh);
                        }
                    }
                }
            }
        },
    );
}
