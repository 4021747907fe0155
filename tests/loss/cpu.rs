//! Losses of the CPU device against plain f64 formulas and finite differences.

use trencadis::cpu::{loss, real::Real};
use trencadis::data::batch::{Mixture, Targets};
use trencadis::ops::ClassificationLoss;
use trencadis::ops::LossKind::{self, Bce, Sigmoid, Softmax};

use crate::support::numbers::{close, random};

fn softmax_reference(z: &[f64], t: &[f64], temperature: f64) -> f64 {
    let z: Vec<f64> = z.iter().map(|z| z / temperature).collect();
    let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = largest + z.iter().map(|z| (z - largest).exp()).sum::<f64>().ln();
    temperature.powi(2) * z.iter().zip(t).map(|(z, t)| t * (lse - z)).sum::<f64>()
}

fn sigmoid_reference(z: &[f64], t: &[f64]) -> f64 {
    z.iter().zip(t).map(|(z, t)| z.max(0.0) - z * t + (-z.abs()).exp().ln_1p()).sum()
}

fn reference(of: ClassificationLoss, z: &[f64], t: &[f64]) -> f64 {
    match of.kind {
        LossKind::Softmax => softmax_reference(z, t, of.temperature),
        LossKind::Sigmoid => sigmoid_reference(z, t),
        LossKind::Bce => sigmoid_reference(z, t) / z.len() as f64,
    }
}

fn smoothed(targets: &Targets, image: usize, classes: usize, smoothing: f64) -> Vec<f64> {
    (0..classes)
        .map(|k| {
            let target = match targets {
                Targets::Classes(class) => f64::from(u8::from(class[image] as usize == k)),
                Targets::Mixed(mixtures) => {
                    let Mixture { classes, shares } = mixtures[image];
                    let own = classes.iter().zip(shares).filter(|(class, _)| **class as usize == k);
                    own.map(|(_, share)| f64::from(share)).sum()
                }
                Targets::Soft(soft) => f64::from(soft[image * classes + k]),
            };
            (1.0 - smoothing) * target + smoothing / classes as f64
        })
        .collect()
}

/// Targets and weights have two slots more than there are images; every fourth weight is 0.
fn check<R: Real>(kind: LossKind, temperature: f64) {
    let (tolerance, numeric) = if size_of::<R>() == 4 { (1e-5, 1e-5) } else { (1e-11, 1e-6) };
    for (images, classes) in [(1, 1), (3, 63), (5, 65), (67, 10), (0, 3), (40, 1000)] {
        let logits: Vec<R> = random::<f64>(images * classes, 1).iter().map(|z| R::of(3.0 * z)).collect();
        let slots = images + 2;
        let weights: Vec<f32> = (0..slots).map(|i| [0.5, 1.0, 2.0, 0.0][i % 4]).collect();
        let soft: Vec<f32> = random::<f32>(slots * classes, 2).iter().map(|x| x.abs() / 4.0).collect();
        let hard: Vec<i32> = (0..slots).map(|i| (i * 7 % classes) as i32).collect();
        let mixed = hard
            .iter()
            .zip(&soft)
            .map(|(&class, &share)| Mixture::new(class, (class + 1) % classes as i32, share.min(1.0)));
        let mixed = Targets::Mixed(mixed.collect());
        for targets in [Targets::Classes(hard), mixed, Targets::Soft(soft)] {
            for smoothing in [0.0, 0.1] {
                let scale = 0.125;
                let mut loss = vec![R::of(f64::NAN); images];
                let mut dlogits = vec![R::of(f64::NAN); logits.len()];
                let of = ClassificationLoss { kind, smoothing, temperature };
                loss::cross_entropy(of, &mut loss, &mut dlogits, &logits, &targets, &weights, classes, scale);
                for image in 0..images {
                    let row = image * classes..(image + 1) * classes;
                    let z: Vec<f64> = logits[row.clone()].iter().map(|z| z.f64()).collect();
                    let t = smoothed(&targets, image, classes, smoothing);
                    let weight = f64::from(weights[image]);
                    close(&loss[image..=image], &[weight * reference(of, &z, &t)], tolerance);
                    let h = 1e-5;
                    let slope = |k: usize| {
                        let (mut up, mut down) = (z.clone(), z.clone());
                        up[k] += h;
                        down[k] -= h;
                        (reference(of, &up, &t) - reference(of, &down, &t)) / (2.0 * h)
                    };
                    // A few classes do for long rows.
                    for k in (0..classes).step_by(1 + classes / 70) {
                        let at = row.start + k;
                        close(&dlogits[at..=at], &[scale * weight * slope(k)], numeric);
                    }
                }
            }
        }
    }
}

#[test]
fn softmax_cross_entropy() {
    for temperature in [1.0, 0.5, 3.0] {
        check::<f32>(Softmax, temperature);
        check::<f64>(Softmax, temperature);
    }
}

#[test]
fn sigmoid_cross_entropy() {
    for kind in [Sigmoid, Bce] {
        check::<f32>(kind, 1.0);
        check::<f64>(kind, 1.0);
    }
}

#[test]
fn extreme_logits_are_finite() {
    let logits = [1e4f32, -1e4, 0.0, -1e4, 1e4, 1e4];
    let targets = Targets::Classes(vec![1, 0]);
    let (mut loss, mut dlogits) = ([0f32; 2], [0f32; 6]);
    loss::cross_entropy(Softmax.into(), &mut loss, &mut dlogits, &logits, &targets, &[1.0, 1.0], 3, 1.0);
    close(&loss, &[2e4, 2e4 + 2f64.ln()], 1e-6);
    close(&dlogits, &[1.0, -1.0, 0.0, -1.0, 0.5, 0.5], 1e-6);
    loss::cross_entropy(Sigmoid.into(), &mut loss, &mut dlogits, &logits, &targets, &[1.0, 1.0], 3, 1.0);
    close(&loss, &[2e4 + 2f64.ln(), 3e4], 1e-6);
    close(&dlogits, &[1.0, -1.0, 0.5, -1.0, 1.0, 1.0], 1e-6);
}

/// An image that does not count leaves no trace, whatever its logits are.
#[test]
fn weight_0_gives_0_even_for_nan() {
    let logits = [f32::NAN, f32::INFINITY];
    let targets = Targets::Classes(vec![0]);
    for kind in [Softmax, Sigmoid, Bce] {
        let (mut loss, mut dlogits) = ([1f32], [1f32; 2]);
        let of = ClassificationLoss { smoothing: 0.1, ..kind.into() };
        loss::cross_entropy(of, &mut loss, &mut dlogits, &logits, &targets, &[0.0], 2, 1.0);
        assert_eq!((loss, dlogits), ([0.0], [0.0; 2]));
    }
}

/// A NaN in the logits of an image that counts must show.
#[test]
fn nan_logits_give_nan_loss() {
    let targets = Targets::Classes(vec![0]);
    for kind in [Softmax, Sigmoid, Bce] {
        let (mut loss, mut dlogits) = ([0f32], [0f32; 3]);
        let logits = [0.5, f32::NAN, 1.0];
        loss::cross_entropy(kind.into(), &mut loss, &mut dlogits, &logits, &targets, &[1.0], 3, 1.0);
        assert!(loss[0].is_nan());
    }
}
