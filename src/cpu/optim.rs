//! AdamW (Loshchilov & Hutter 2019), LAMB (You et al. 2020), SGD with momentum, Adafactor ([`adafactor`]), gradient
//! norm, moving average.

pub mod adafactor;

use super::simd::{for_each, map, sum_by, task_len, vectorised};

/// Constants of one AdamW step for one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// β1.
    pub beta1: f64,
    /// β2.
    pub beta2: f64,
    /// ε, added to √v̂.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// Factor on the gradient (clipping).
    pub grad_scale: f64,
}

/// One step in place on parameter `p`, moments `m` and `v`, as in PyTorch:
/// `m = β1·m + (1 − β1)·g`, `v = β2·v + (1 − β2)·g²`,
/// `p −= lr·(m / (1 − β1ᵗ) / (√(v / (1 − β2ᵗ)) + ε) + weight_decay·p)`.
///
/// The factors of the step are computed in f64, the elements in f32.
pub fn adamw(config: &AdamW, p: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32]) {
    let step = config.step as f64;
    let correction1 = 1.0 - config.beta1.powf(step);
    let correction2 = 1.0 - config.beta2.powf(step);
    let grad_scale = config.grad_scale as f32;
    let (keep1, new1) = (config.beta1 as f32, (1.0 - config.beta1) as f32);
    let (keep2, new2) = (config.beta2 as f32, (1.0 - config.beta2) as f32);
    let rate = (config.lr / correction1) as f32;
    let root2 = (1.0 / correction2.sqrt()) as f32;
    let eps = config.eps as f32;
    let decay = (config.lr * config.weight_decay) as f32;

    let len = task_len(1);
    let tasks = p.chunks_mut(len).zip(m.chunks_mut(len)).zip(v.chunks_mut(len)).zip(grad.chunks(len));
    for_each(tasks, |(((p, m), v), grad)| {
        vectorised(
            #[inline(always)]
            || {
                for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(grad) {
                    let g = g * grad_scale;
                    *m = keep1.mul_add(*m, new1 * g);
                    *v = keep2.mul_add(*v, new2 * g * g);
                    let update = rate * *m / v.sqrt().mul_add(root2, eps);
                    // One rounding of p: 1 − lr·weight_decay is often 1 in f32.
                    *p -= decay.mul_add(*p, update);
                }
            },
        );
    });
}

/// Constants of one LAMB step for one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lamb {
    /// Those of the update, with weight decay within it.
    pub adam: AdamW,
    /// Whether the update is scaled to the norm of the parameter; by custom, where weight decay is not 0.
    pub adapts: bool,
}

/// One step in place on the whole of parameter `p`, moments `m` and `v`: with the update u of [`lamb_update`],
/// `p −= lr·r·u`, where the trust ratio r is `‖p‖ / ‖u‖`, and 1 where either is 0 or the parameter does not adapt.
pub fn lamb(config: &Lamb, p: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32]) {
    let update = lamb_update(&config.adam, p, m, v, grad);
    let squares = [sum_of_squares(p), sum_of_squares(&update)];
    lamb_apply(config, squares, p, &update);
}

/// What [`lamb`] computes of any elements of a parameter before its norms: new m and v as for [`adamw`], and
/// `u = m / (1 − β1ᵗ) / (√(v / (1 − β2ᵗ)) + ε) + weight_decay·p`.
pub fn lamb_update(config: &AdamW, p: &[f32], m: &mut [f32], v: &mut [f32], grad: &[f32]) -> Vec<f32> {
    let AdamW { beta1, beta2, eps, weight_decay, step, grad_scale, .. } = *config;
    let inverse1 = (1.0 / (1.0 - beta1.powf(step as f64))) as f32;
    let root2 = (1.0 / (1.0 - beta2.powf(step as f64)).sqrt()) as f32;
    let (grad_scale, eps, decay) = (grad_scale as f32, eps as f32, weight_decay as f32);
    let (keep1, new1) = (beta1 as f32, (1.0 - beta1) as f32);
    let (keep2, new2) = (beta2 as f32, (1.0 - beta2) as f32);

    let len = task_len(1);
    let mut update = vec![0f32; p.len()];
    let moments = m.chunks_mut(len).zip(v.chunks_mut(len));
    let tasks = update.chunks_mut(len).zip(moments).zip(p.chunks(len)).zip(grad.chunks(len));
    for_each(tasks, |(((update, (m, v)), p), grad)| {
        vectorised(
            #[inline(always)]
            || {
                for ((((u, m), v), &p), &g) in update.iter_mut().zip(m).zip(v).zip(p).zip(grad) {
                    let g = g * grad_scale;
                    *m = keep1.mul_add(*m, new1 * g);
                    *v = keep2.mul_add(*v, new2 * g * g);
                    *u = decay.mul_add(p, inverse1 * *m / v.sqrt().mul_add(root2, eps));
                }
            },
        );
    });
    update
}

/// What [`lamb`] computes after the norms, of the same elements: `‖p‖²` and `‖u‖²` of the whole parameter are given.
pub fn lamb_apply(config: &Lamb, [size, change]: [f64; 2], p: &mut [f32], update: &[f32]) {
    let ratio = if config.adapts && size > 0.0 && change > 0.0 { size.sqrt() / change.sqrt() } else { 1.0 };
    let rate = (config.adam.lr * ratio) as f32;
    let len = task_len(1);
    for_each(p.chunks_mut(len).zip(update.chunks(len)), |(p, update)| {
        vectorised(
            #[inline(always)]
            || {
                for (p, &u) in p.iter_mut().zip(update) {
                    *p = (-rate).mul_add(u, *p);
                }
            },
        );
    });
}

/// Constants of one SGD step for one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate of this step.
    pub lr: f64,
    /// How much of its momentum a step keeps.
    pub momentum: f64,
    /// Whether the step looks ahead by one momentum.
    pub nesterov: bool,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// Factor on the gradient (clipping).
    pub grad_scale: f64,
}

/// One step in place on parameter `p` and momentum `m`: `m = momentum·m + g`, `p −= lr·(m + weight_decay·p)`, with
/// Nesterov momentum `p −= lr·(g + momentum·m + weight_decay·p)`.
///
/// Momentum is that of `torch.optim.SGD` without dampening and of `optax.trace`. Weight decay stands beside it, as in
/// big_vision's optimiser of ViT and its transfers (`momentum_hp`), and not within the gradient as PyTorch has it.
pub fn sgd(config: &Sgd, p: &mut [f32], m: &mut [f32], grad: &[f32]) {
    let (grad_scale, keep, rate) = (config.grad_scale as f32, config.momentum as f32, config.lr as f32);
    let decay = (config.lr * config.weight_decay) as f32;
    let nesterov = config.nesterov;
    let len = task_len(1);
    for_each(p.chunks_mut(len).zip(m.chunks_mut(len)).zip(grad.chunks(len)), |((p, m), grad)| {
        vectorised(
            #[inline(always)]
            || {
                for ((p, m), &g) in p.iter_mut().zip(m).zip(grad) {
                    let g = g * grad_scale;
                    *m = keep.mul_add(*m, g);
                    let step = if nesterov { keep.mul_add(*m, g) } else { *m };
                    // One rounding of p, as for AdamW.
                    *p -= decay.mul_add(*p, rate * step);
                }
            },
        );
    });
}

/// Σ g² in f64, in fixed chunks.
pub fn sum_of_squares(grad: &[f32]) -> f64 {
    map(grad.chunks(task_len(1)), |grad| {
        vectorised(
            #[inline(always)]
            || sum_by(grad, |g| f64::from(g) * f64::from(g)),
        )
    })
    .into_iter()
    .sum()
}

/// `average = decay·average + (1 − decay)·p`.
pub fn moving_average(average: &mut [f32], p: &[f32], decay: f64) {
    let new = (1.0 - decay) as f32;
    for_each(average.chunks_mut(task_len(1)).zip(p.chunks(task_len(1))), |(average, p)| {
        vectorised(
            #[inline(always)]
            || {
                for (average, &p) in average.iter_mut().zip(p) {
                    *average = new.mul_add(p - *average, *average);
                }
            },
        );
    });
}
