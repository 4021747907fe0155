//! Linear layers: GEMM by the `gemm` crate, bias and GELU around it.
//!
//! Weights are `[out, in]` as in PyTorch: `y = x wᵀ + b`.

use super::real::Real;
use crate::models::recipe::GeluKind;

/// `y[m, out] = x[m, in] · w[out, in]ᵀ + bias[out]`.
pub fn linear<R: Real>(y: &mut [R], x: &[R], w: &[R], bias: Option<&[R]>, inner: usize, outer: usize) {
    todo!()
}

/// `dx[m, in] = dy[m, out] · w[out, in]`.
pub fn linear_input_grad<R: Real>(dx: &mut [R], dy: &[R], w: &[R], inner: usize, outer: usize) {
    todo!()
}

/// `dw[out, in] += dyᵀ[out, m] · x[m, in]`.
pub fn linear_weight_grad<R: Real>(dw: &mut [R], dy: &[R], x: &[R], inner: usize, outer: usize) {
    todo!()
}

/// `db[n] += Σ_rows dy[rows, n]`.
pub fn bias_grad<R: Real>(db: &mut [R], dy: &[R]) {
    todo!()
}

/// `y = gelu(x)` elementwise.
pub fn gelu<R: Real>(y: &mut [R], x: &[R], kind: GeluKind) {
    todo!()
}

/// `dx *= gelu'(x)` elementwise, where `dx` holds the gradient of the result.
pub fn gelu_grad<R: Real>(dx: &mut [R], x: &[R], kind: GeluKind) {
    todo!()
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
    todo!()
}
