//! From the tokens of an image to one vector: masked attention pooling and mean pooling.

use super::attention::{AttentionConfig, QkAffine, QkAffineGrad};
use super::real::Real;

/// Masked attention pooling: `out[N, heads·head_dim]` and `lse[N, heads]` from one query
/// `q[heads·head_dim]` shared by all images and `kv[T, 2·heads·head_dim]`, rows `[k | v]`.
/// The first `skip` tokens of every image (prefix tokens) are left out; an image without
/// remaining tokens gives zeros.
#[allow(clippy::too_many_arguments)]
pub fn attention_forward<R: Real>(
    config: &AttentionConfig,
    out: &mut [R],
    lse: &mut [R],
    q: &[R],
    kv: &[R],
    affine: QkAffine<'_, R>,
    cu_seqlens: &[i32],
    skip: usize,
) {
    todo!()
}

/// `dq` and `dkv` (written, `dq` summed over the images) and the gradients of the gains (added).
#[allow(clippy::too_many_arguments)]
pub fn attention_backward<R: Real>(
    config: &AttentionConfig,
    dq: &mut [R],
    dkv: &mut [R],
    daffine: QkAffineGrad<'_, R>,
    dout: &[R],
    out: &[R],
    lse: &[R],
    q: &[R],
    kv: &[R],
    affine: QkAffine<'_, R>,
    cu_seqlens: &[i32],
    skip: usize,
) {
    todo!()
}

/// Mean over the tokens of each image after the first `skip`: `out[N, D]` from `x[T, D]`.
pub fn mean_forward<R: Real>(out: &mut [R], x: &[R], cu_seqlens: &[i32], skip: usize, width: usize) {
    todo!()
}

/// `dx[T, D]` (written) from `dout[N, D]`.
pub fn mean_backward<R: Real>(dx: &mut [R], dout: &[R], cu_seqlens: &[i32], skip: usize, width: usize) {
    todo!()
}

/// `out[i] = x[rows[i]]`: token gather, rows of `width`.
pub fn gather<R: Real>(out: &mut [R], x: &[R], rows: &[u32], width: usize) {
    todo!()
}

/// `dx` (written, zero where nothing is gathered) with `dx[rows[i]] += dout[i]`, in order of `i`.
pub fn gather_grad<R: Real>(dx: &mut [R], dout: &[R], rows: &[u32], width: usize) {
    todo!()
}
