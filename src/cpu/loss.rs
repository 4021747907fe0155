//! Losses with their gradients in one pass.

use super::real::Real;
use crate::data::batch::Targets;

/// Softmax cross-entropy. `loss[i]` is the weighted loss of image `i`; `dlogits[N, K]` is the
/// gradient of `scale · Σ_i weight_i · loss_i`. Label smoothing s replaces a target by
/// `(1 − s)·target + s/K`.
#[allow(clippy::too_many_arguments)]
pub fn softmax_cross_entropy<R: Real>(
    loss: &mut [R],
    dlogits: &mut [R],
    logits: &[R],
    targets: &Targets,
    weights: &[f32],
    classes: usize,
    smoothing: f64,
    scale: f64,
) {
    todo!()
}

/// Sigmoid cross-entropy, summed over classes (ViT-22B, NaViT); arguments as above.
#[allow(clippy::too_many_arguments)]
pub fn sigmoid_cross_entropy<R: Real>(
    loss: &mut [R],
    dlogits: &mut [R],
    logits: &[R],
    targets: &Targets,
    weights: &[f32],
    classes: usize,
    smoothing: f64,
    scale: f64,
) {
    todo!()
}
