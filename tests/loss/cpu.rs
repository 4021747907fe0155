//! Losses of the CPU device against plain f64 formulas and finite differences.

use trencadis::cpu::{loss, real::Real};
use trencadis::data::batch::{Mixture, Targets};

use crate::support::numbers::{close, random};

/// Both functions have this shape.
type Loss<R> = fn(&mut [R], &mut [R], &[R], &Targets, &[f32], usize, f64, f64);

fn softmax_reference(z: &[f64], t: &[f64]) -> f64 {
    let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = largest + z.iter().map(|z| (z - largest).exp()).sum::<f64>().ln();
    z.iter().zip(t).map(|(z, t)| t * (lse - z)).sum()
}

fn sigmoid_reference(z: &[f64], t: &[f64]) -> f64 {
    z.iter().zip(t).map(|(z, t)| z.max(0.0) - z * t + (-z.abs()).exp().ln_1p()).sum()
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
fn check<R: Real>(function: Loss<R>, reference: fn(&[f64], &[f64]) -> f64) {
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
                function(&mut loss, &mut dlogits, &logits, &targets, &weights, classes, smoothing, scale);
                for image in 0..images {
                    let row = image * classes..(image + 1) * classes;
                    let z: Vec<f64> = logits[row.clone()].iter().map(|z| z.f64()).collect();
                    let t = smoothed(&targets, image, classes, smoothing);
                    let weight = f64::from(weights[image]);
                    close(&loss[image..=image], &[weight * reference(&z, &t)], tolerance);
                    let h = 1e-5;
                    let slope = |k: usize| {
                        let (mut up, mut down) = (z.clone(), z.clone());
                        up[k] += h;
                        down[k] -= h;
                        (reference(&up, &t) - reference(&down, &t)) / (2.0 * h)
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
fn softmax_cross_entropy_f32() {
    check::<f32>(loss::softmax_cross_entropy, softmax_reference);
}

#[test]
fn softmax_cross_entropy_f64() {
    check::<f64>(loss::softmax_cross_entropy, softmax_reference);
}

#[test]
fn sigmoid_cross_entropy_f32() {
    check::<f32>(loss::sigmoid_cross_entropy, sigmoid_reference);
}

#[test]
fn sigmoid_cross_entropy_f64() {
    check::<f64>(loss::sigmoid_cross_entropy, sigmoid_reference);
}

#[test]
fn extreme_logits_are_finite() {
    let logits = [1e4f32, -1e4, 0.0, -1e4, 1e4, 1e4];
    let targets = Targets::Classes(vec![1, 0]);
    let (mut loss, mut dlogits) = ([0f32; 2], [0f32; 6]);
    loss::softmax_cross_entropy(&mut loss, &mut dlogits, &logits, &targets, &[1.0, 1.0], 3, 0.0, 1.0);
    close(&loss, &[2e4, 2e4 + 2f64.ln()], 1e-6);
    close(&dlogits, &[1.0, -1.0, 0.0, -1.0, 0.5, 0.5], 1e-6);
    loss::sigmoid_cross_entropy(&mut loss, &mut dlogits, &logits, &targets, &[1.0, 1.0], 3, 0.0, 1.0);
    close(&loss, &[2e4 + 2f64.ln(), 3e4], 1e-6);
    close(&dlogits, &[1.0, -1.0, 0.5, -1.0, 1.0, 1.0], 1e-6);
}

/// An image that does not count leaves no trace, whatever its logits are.
#[test]
fn weight_0_gives_0_even_for_nan() {
    let logits = [f32::NAN, f32::INFINITY];
    let targets = Targets::Classes(vec![0]);
    for function in [loss::softmax_cross_entropy::<f32> as Loss<f32>, loss::sigmoid_cross_entropy] {
        let (mut loss, mut dlogits) = ([1f32], [1f32; 2]);
        function(&mut loss, &mut dlogits, &logits, &targets, &[0.0], 2, 0.1, 1.0);
        assert_eq!((loss, dlogits), ([0.0], [0.0; 2]));
    }
}

/// A NaN in the logits of an image that counts must show.
#[test]
fn nan_logits_give_nan_loss() {
    let targets = Targets::Classes(vec![0]);
    for function in [loss::softmax_cross_entropy::<f32> as Loss<f32>, loss::sigmoid_cross_entropy] {
        let (mut loss, mut dlogits) = ([0f32], [0f32; 3]);
        function(&mut loss, &mut dlogits, &[0.5, f32::NAN, 1.0], &targets, &[1.0], 3, 0.0, 1.0);
        assert!(loss[0].is_nan());
    }
}
