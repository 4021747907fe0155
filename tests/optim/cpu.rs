//! AdamW, LAMB, gradient norm and moving average of the CPU device against plain loops in f64.

use trencadis::cpu::optim::{self, AdamW, Lamb};

use crate::support::numbers::{close, random};

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// PyTorch's update, in f64.
fn reference(config: &AdamW, p: &mut [f64], m: &mut [f64], v: &mut [f64], grad: &[f32]) {
    let t = config.step as i32;
    for i in 0..p.len() {
        let g = f64::from(grad[i]) * config.grad_scale;
        p[i] *= 1.0 - config.lr * config.weight_decay;
        m[i] = config.beta1 * m[i] + (1.0 - config.beta1) * g;
        v[i] = config.beta2 * v[i] + (1.0 - config.beta2) * g * g;
        let m_hat = m[i] / (1.0 - config.beta1.powi(t));
        let v_hat = v[i] / (1.0 - config.beta2.powi(t));
        p[i] -= config.lr * m_hat / (v_hat.sqrt() + config.eps);
    }
}

#[test]
fn five_steps_of_adamw() {
    for n in [0, 1, 3, 63, 65, 67, 40_000] {
        for weight_decay in [0.0, 0.3] {
            let (mut p, mut m, mut v): (Vec<f32>, _, _) = (random(n, 1), vec![0f32; n], vec![0f32; n]);
            let (mut wide_p, mut wide_m, mut wide_v) = (wide(&p), wide(&m), wide(&v));
            for step in 1..=5 {
                let config = AdamW {
                    lr: 0.01 * step as f64,
                    beta1: 0.9,
                    beta2: 0.999,
                    eps: 1e-8,
                    weight_decay,
                    step,
                    grad_scale: 0.5,
                };
                let grad: Vec<f32> = random(n, 10 + step);
                optim::adamw(&config, &mut p, &mut m, &mut v, &grad);
                reference(&config, &mut wide_p, &mut wide_m, &mut wide_v, &grad);
            }
            close(&p, &wide_p, 2e-6);
            close(&m, &wide_m, 1e-6);
            close(&v, &wide_v, 1e-6);
        }
    }
}

/// Apex's and timm's update, in f64.
fn lamb_reference(config: &Lamb, p: &mut [f64], m: &mut [f64], v: &mut [f64], grad: &[f32]) {
    let AdamW { lr, beta1, beta2, eps, weight_decay, step, grad_scale } = config.adam;
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut update = vec![0.0; p.len()];
    for i in 0..p.len() {
        let g = f64::from(grad[i]) * grad_scale;
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        let denominator = v[i].sqrt() / (1.0 - beta2.powi(step as i32)).sqrt() + eps;
        update[i] = m[i] / (1.0 - beta1.powi(step as i32)) / denominator + weight_decay * p[i];
    }
    let mut trust = 1.0;
    if config.adapts && norm(p) > 0.0 && norm(&update) > 0.0 {
        trust = norm(p) / norm(&update);
    }
    p.iter_mut().zip(&update).for_each(|(p, u)| *p -= lr * trust * u);
}

#[test]
fn five_steps_of_lamb() {
    for n in [0, 1, 3, 63, 65, 67, 40_000] {
        for (weight_decay, adapts) in [(0.0, false), (0.02, true), (0.05, false), (0.0, true)] {
            let (mut p, mut m, mut v): (Vec<f32>, _, _) = (random(n, 1), vec![0f32; n], vec![0f32; n]);
            let (mut wide_p, mut wide_m, mut wide_v) = (wide(&p), wide(&m), wide(&v));
            for step in 1..=5 {
                let adam = AdamW {
                    lr: 3e-3 * step as f64,
                    beta1: 0.9,
                    beta2: 0.999,
                    eps: 1e-8,
                    weight_decay,
                    step,
                    grad_scale: 0.5,
                };
                let grad: Vec<f32> = random(n, 10 + step);
                optim::lamb(&Lamb { adam, adapts }, &mut p, &mut m, &mut v, &grad);
                lamb_reference(&Lamb { adam, adapts }, &mut wide_p, &mut wide_m, &mut wide_v, &grad);
            }
            close(&p, &wide_p, 2e-6);
            close(&m, &wide_m, 1e-6);
            close(&v, &wide_v, 1e-6);
        }
    }
}

/// The size of the step follows the parameter; what is 0 moves as with Adam.
#[test]
fn lamb_moves_by_the_norm_of_the_parameter() {
    let adam =
        AdamW { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-12, weight_decay: 0.0, step: 1, grad_scale: 1.0 };
    for (adapts, start, moved) in [(true, 3.0, 0.03), (false, 3.0, 0.01), (true, 0.0, 0.01)] {
        let (mut p, mut m, mut v) = ([start; 4], [0f32; 4], [0f32; 4]);
        optim::lamb(&Lamb { adam, adapts }, &mut p, &mut m, &mut v, &[2.0, -2.0, 5.0, 7.0]);
        close(&p, &[-moved, moved, -moved, -moved].map(|x| f64::from(start) + x), 1e-6);
    }
    // Nothing to scale: neither gradient nor decay.
    let (mut p, mut m, mut v) = ([1f32; 4], [0f32; 4], [0f32; 4]);
    optim::lamb(&Lamb { adam, adapts: true }, &mut p, &mut m, &mut v, &[0.0; 4]);
    assert_eq!(p, [1.0; 4]);
}

/// A parameter without gradient, now or ever, moves by its decay alone.
#[test]
fn zero_gradient_and_small_decay() {
    let config =
        AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.01, step: 1, grad_scale: 1.0 };
    let (mut p, mut m, mut v) = ([1.5f32; 3], [0f32; 3], [0f32; 3]);
    optim::adamw(&config, &mut p, &mut m, &mut v, &[0.0; 3]);
    close(&p, &[1.5 * (1.0 - 1e-6); 3], 1e-7);
    assert_eq!((m, v), ([0.0; 3], [0.0; 3]));
}

#[test]
fn sum_of_squares_is_exact_to_f64_and_independent_of_threads() {
    for n in [0, 1, 65, 100_003] {
        let grad: Vec<f32> = random(n, 1);
        let want: f64 = wide(&grad).iter().map(|g| g * g).sum();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| optim::sum_of_squares(&grad))
        };
        let one = run(1);
        assert!((one - want).abs() <= 1e-12 * want.max(1.0));
        assert_eq!(one.to_bits(), run(4).to_bits());
    }
}

#[test]
fn moving_average_moves() {
    for n in [0, 3, 65, 40_000] {
        let (mut average, p): (Vec<f32>, Vec<f32>) = (random(n, 1), random(n, 2));
        let want: Vec<f64> =
            wide(&average).iter().zip(wide(&p)).map(|(a, p)| 0.9999 * a + (1.0 - 0.9999) * p).collect();
        optim::moving_average(&mut average, &p, 0.9999);
        close(&average, &want, 2e-7);
    }
}
