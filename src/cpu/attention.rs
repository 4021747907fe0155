//! Packed block-diagonal attention with QK-norm.
//!
//! Row `t` of `qkv` is `[q | k | v]`, each `[heads, head_dim]`. A token attends to the tokens of
//! its own image, `cu_seqlens[i]..cu_seqlens[i+1]`; no T×T matrix is built: a task owns one
//! (image, head) and walks blocks of query rows, so scratch is at most block × S.
//! With QK-norm, `q̂ = norm(q) ⊙ γq (+ βq)`, likewise k; scores are `scale · q̂ k̂ᵀ`.

use super::real::Real;
use crate::models::recipe::QkNormKind;

/// Constants of an attention op.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f64,
    /// Normalisation of q and k over the head dimension.
    pub norm: QkNormKind,
    /// Epsilon of that normalisation.
    pub eps: f64,
    /// Whether gains are `[heads, head_dim]` or one `[head_dim]` for all heads.
    pub gain_per_head: bool,
}

/// Gains and biases of QK-norm, `[heads, head_dim]` or `[head_dim]`; absent gain is 1, absent bias 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct QkAffine<'a, R> {
    /// γq.
    pub q_gain: Option<&'a [R]>,
    /// γk.
    pub k_gain: Option<&'a [R]>,
    /// βq.
    pub q_bias: Option<&'a [R]>,
    /// βk.
    pub k_bias: Option<&'a [R]>,
}

/// Gradients of [`QkAffine`], added to.
#[derive(Debug, Default)]
pub struct QkAffineGrad<'a, R> {
    /// dγq.
    pub q_gain: Option<&'a mut [R]>,
    /// dγk.
    pub k_gain: Option<&'a mut [R]>,
    /// dβq.
    pub q_bias: Option<&'a mut [R]>,
    /// dβk.
    pub k_bias: Option<&'a mut [R]>,
}

/// `out[T, heads·head_dim]` and `lse[T, heads]` (log-sum-exp of the scaled scores) from
/// `qkv[T, 3·heads·head_dim]`. `cu_seqlens` holds the used images only, `images + 1` entries.
pub fn forward<R: Real>(
    config: &AttentionConfig,
    out: &mut [R],
    lse: &mut [R],
    qkv: &[R],
    affine: QkAffine<'_, R>,
    cu_seqlens: &[i32],
) {
    todo!()
}

/// `dqkv` (written) and the gradients of the gains (added) from `dout`. Probabilities are made
/// again from the scores and `lse`.
#[allow(clippy::too_many_arguments)]
pub fn backward<R: Real>(
    config: &AttentionConfig,
    dqkv: &mut [R],
    daffine: QkAffineGrad<'_, R>,
    dout: &[R],
    out: &[R],
    lse: &[R],
    qkv: &[R],
    affine: QkAffine<'_, R>,
    cu_seqlens: &[i32],
) {
    todo!()
}
