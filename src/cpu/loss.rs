//! Losses with their gradients in one pass.
//!
//! `logits` and `dlogits` hold the used images; `targets` and `weights` may hold all slots, of
//! which the first are read. An image of weight 0 has loss 0 and gradient 0.

use super::real::Real;
use super::simd::{for_each, largest, sum_by, sum2_by, task_len, task_rows, vectorised};
use crate::data::batch::Targets;
use crate::ops::{ClassificationLoss, LossKind};

/// Cross-entropy of `of` over `classes` classes. `loss[i]` is the weighted loss of image `i`; `dlogits[N, K]` is the
/// gradient of `scale · Σ_i weight_i · loss_i`. With t the target after smoothing and z the logits:
///
/// * softmax: `Σ_k t_k (lse(z) − z_k)`, of gradient `softmax(z)·Σt − t`;
/// * sigmoid: `Σ_k max(z_k, 0) − z_k t_k + ln(1 + e^−|z_k|)`, of gradient `σ(z) − t`;
///
/// times what [`ClassificationLoss`] says of temperatures and means.
#[allow(clippy::too_many_arguments)]
pub fn cross_entropy<R: Real>(
    of: ClassificationLoss,
    loss: &mut [R],
    dlogits: &mut [R],
    logits: &[R],
    targets: &Targets,
    weights: &[f32],
    classes: usize,
    scale: f64,
) {
    let sharpness = R::of(1.0 / of.temperature);
    let operands = (loss, dlogits, logits);
    match of.kind {
        LossKind::Softmax => for_rows(
            of,
            operands,
            targets,
            weights,
            classes,
            scale,
            #[inline(always)]
            |d, z| softmax_row(d, z, sharpness),
        ),
        LossKind::Sigmoid | LossKind::Bce => for_rows(
            of,
            operands,
            targets,
            weights,
            classes,
            scale,
            #[inline(always)]
            |d, z| sigmoid_row(d, z),
        ),
    }
}

/// Runs `row(d, z) -> loss` for every image, where `d` holds the smoothed target and receives the
/// gradient by the logits `z`, and applies weight and scale. `row` has to be a closure that is
/// always inlined: a function's name given for it is called through a shim that is compiled for the
/// baseline.
#[inline(always)]
fn for_rows<R: Real>(
    of: ClassificationLoss,
    (loss, dlogits, logits): (&mut [R], &mut [R], &[R]),
    targets: &Targets,
    weights: &[f32],
    classes: usize,
    scale: f64,
    row: impl Fn(&mut [R], &[R]) -> R + Copy + Send + Sync,
) {
    let (unit, slope) = (of.unit(classes), of.slope(classes));
    let (len, rows) = (task_len(classes), task_rows(classes));
    let tasks = loss.chunks_mut(rows).zip(dlogits.chunks_mut(len)).zip(logits.chunks(len)).enumerate();
    for_each(tasks, |(task, ((loss, dlogits), logits))| {
        vectorised(
            #[inline(always)]
            || {
                let images = dlogits.chunks_exact_mut(classes).zip(logits.chunks_exact(classes));
                for (i, ((d, z), loss)) in images.zip(loss).enumerate() {
                    let image = task * rows + i;
                    if weights[image] == 0.0 {
                        *loss = R::ZERO;
                        d.fill(R::ZERO);
                        continue;
                    }
                    smoothed_target(d, targets, image, of.smoothing);
                    *loss = R::of(f64::from(weights[image]) * unit) * row(d, z);
                    let factor = R::of(f64::from(weights[image]) * scale * slope);
                    d.iter_mut().for_each(|d| *d *= factor);
                }
            },
        );
    });
}

#[inline(always)]
fn smoothed_target<R: Real>(t: &mut [R], targets: &Targets, image: usize, smoothing: f64) {
    let classes = t.len();
    let (kept, floor) = (R::of(1.0 - smoothing), R::of(smoothing / classes as f64));
    match targets {
        Targets::Classes(class) => {
            t.fill(floor);
            t[class[image] as usize] += kept;
        }
        Targets::Mixed(mixtures) => {
            t.fill(floor);
            let mixture = &mixtures[image];
            for (&class, &share) in mixture.classes.iter().zip(&mixture.shares) {
                let t = &mut t[class as usize];
                *t = kept.mul_add(R::of(f64::from(share)), *t);
            }
        }
        Targets::Soft(soft) => {
            let soft = &soft[image * classes..(image + 1) * classes];
            t.iter_mut().zip(soft).for_each(|(t, &soft)| *t = kept.mul_add(R::of(f64::from(soft)), floor));
        }
    }
}

#[inline(always)]
fn softmax_row<R: Real>(d: &mut [R], z: &[R], sharpness: R) -> R {
    let Some(largest) = largest(z) else { return R::ZERO };
    let sum = sum_by(
        z,
        #[inline(always)]
        |z| ((z - largest) * sharpness).exp(),
    );
    let target_sum = sum_by(d, |t| t);
    let log_sum = sum.ln();
    // Logits are taken relative to the largest, so that no large numbers are subtracted.
    let loss = sum2_by(d, z, |t, z| t * (log_sum - (z - largest) * sharpness));
    let factor = target_sum / sum;
    for (d, &z) in d.iter_mut().zip(z) {
        *d = ((z - largest) * sharpness).exp() * factor - *d;
    }
    loss
}

#[inline(always)]
fn sigmoid_row<R: Real>(d: &mut [R], z: &[R]) -> R {
    let loss = sum2_by(
        d,
        z,
        #[inline(always)]
        |t, z| {
            let small = (-abs(z)).exp();
            z.max(R::ZERO) - z * t + small.ln_1p()
        },
    );
    for (d, &z) in d.iter_mut().zip(z) {
        let small = (-abs(z)).exp();
        let numerator = if z >= R::ZERO { R::ONE } else { small };
        *d = numerator / (R::ONE + small) - *d;
    }
    loss
}

#[inline(always)]
fn abs<R: Real>(x: R) -> R {
    x.max(-x)
}
