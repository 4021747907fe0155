//! Multinomial logistic regression by stochastic gradient descent with momentum: a linear probe.
//!
//! From zeros, over batches of standardised features x with the mean gradient of −log softmax(Wx + b)\[class\]:
//! v ← m·v + g, w ← w − η·v (as PyTorch's SGD), the learning rate η following half a cosine from its peak to 0.

use super::Standard;
use crate::cpu::gemm::{bias_grad, linear, linear_weight_grad};
use crate::cpu::real::Real;

/// Momentum m.
pub const MOMENTUM: f64 = 0.9;

/// Images whose logits are computed together.
const PART: usize = 1024;

/// How it is fitted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Peak learning rate.
    pub lr: f64,
    /// Passes over the images, at least 1.
    pub epochs: usize,
    /// Images of a step, the last of an epoch excepted.
    pub batch: usize,
}

/// What was fitted.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted<R> {
    /// `[K, D]`.
    pub weights: Vec<R>,
    /// `[K]`.
    pub bias: Vec<R>,
    /// Mean loss of each epoch, of every batch before its step.
    pub losses: Vec<f64>,
}

/// What it is fitted to; each batch is standardised when its turn comes, so that no other copy of the features is held.
#[derive(Clone, Copy)]
pub struct Images<'a> {
    /// `[.., D]` as they are.
    pub features: &'a [f32],
    /// Mean and deviation of those of the images.
    pub standard: &'a Standard,
    /// `[images]` rows of `features`.
    pub rows: &'a [usize],
}

/// Fits it to `images` with their `labels`. `order(epoch)` is the order in which that epoch takes the images.
pub fn fit<R: Real>(
    images: Images<'_>,
    labels: &[usize],
    classes: usize,
    sgd: Sgd,
    order: impl Fn(usize) -> Vec<usize>,
) -> Fitted<R> {
    let Images { features, standard, rows } = images;
    let (images, width) = (rows.len(), standard.mean.len());
    let (batch, total) = (sgd.batch.max(1), sgd.epochs * images.div_ceil(sgd.batch.max(1)));
    let standardised = |image: usize| standard.apply(&features[rows[image] * width..][..width]).map(R::of);
    let (mut weights, mut bias) = (vec![R::ZERO; classes * width], vec![R::ZERO; classes]);
    let (mut weights_velocity, mut bias_velocity) = (weights.clone(), bias.clone());
    let mut losses = Vec::with_capacity(sgd.epochs);
    let mut step = 0;
    for epoch in 0..sgd.epochs {
        let mut loss = 0.0;
        for taken in order(epoch).chunks(batch) {
            let x: Vec<R> = taken.iter().copied().flat_map(standardised).collect();
            let mut logits = vec![R::ZERO; taken.len() * classes];
            linear(&mut logits, &x, &weights, Some(&bias), width, classes);
            for (logits, &image) in logits.chunks_exact_mut(classes).zip(taken) {
                loss += softmax_grad(logits, labels[image], taken.len());
            }
            // Momentum first: what follows adds the gradients.
            let scaled = |velocity: &mut [R]| velocity.iter_mut().for_each(|v| *v *= R::of(MOMENTUM));
            scaled(&mut weights_velocity);
            scaled(&mut bias_velocity);
            linear_weight_grad(&mut weights_velocity, &logits, &x, width, classes);
            bias_grad(&mut bias_velocity, &logits);
            let cosine = (std::f64::consts::PI * f64::from(step) / total as f64).cos();
            let lr = R::of(sgd.lr * 0.5 * (1.0 + cosine));
            let move_by = |values: &mut [R], velocity: &[R]| {
                values.iter_mut().zip(velocity).for_each(|(w, v)| *w -= lr * *v);
            };
            move_by(&mut weights, &weights_velocity);
            move_by(&mut bias, &bias_velocity);
            step += 1;
        }
        losses.push(loss / images as f64);
    }
    Fitted { weights, bias, losses }
}

/// Turns the logits of an image into (softmax − one-hot) / `images`, and returns its loss.
fn softmax_grad<R: Real>(logits: &mut [R], label: usize, images: usize) -> f64 {
    let most = logits.iter().copied().fold(logits[0], Real::max);
    let shifted = (logits[label] - most).f64();
    logits.iter_mut().for_each(|x| *x = (*x - most).exp());
    let sum = logits.iter().fold(R::ZERO, |sum, x| sum + *x);
    logits.iter_mut().for_each(|x| *x = *x / sum);
    logits[label] -= R::ONE;
    logits.iter_mut().for_each(|x| *x = *x / R::of(images as f64));
    sum.f64().ln() - shifted
}

impl Fitted<f32> {
    /// Logits `[images, K]` of the features `[D]` of each image as they are, which `standard` standardises.
    pub fn logits<'a>(&self, rows: impl Iterator<Item = &'a [f32]>, standard: &Standard) -> Vec<f32> {
        let (width, classes) = (standard.mean.len(), self.bias.len());
        let rows: Vec<&[f32]> = rows.collect();
        let mut logits = vec![0.0; rows.len() * classes];
        for (logits, rows) in logits.chunks_mut(PART * classes).zip(rows.chunks(PART)) {
            let x: Vec<f32> = rows.iter().flat_map(|row| standard.apply(row)).map(|x| x as f32).collect();
            linear(logits, &x, &self.weights, Some(&self.bias), width, classes);
        }
        logits
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{close, golden, labels};
    use super::*;

    #[test]
    fn as_numpy_fits_it() {
        let (shape, features) = golden("many.features");
        let (images, width) = (shape[0], shape[1]);
        let labels = labels("many.labels");
        let orders: Vec<usize> = golden("orders").1.iter().map(|&row| row as usize).collect();
        let order = |epoch: usize| orders[epoch * images..][..images].to_vec();
        let standard = Standard::of(features.chunks(width));
        // They stand in other rows than the first.
        let apart: Vec<f32> = [&vec![f32::NAN; 2 * width], &features[..]].concat();
        let rows: Vec<usize> = (2..images + 2).collect();
        let taken = Images { features: &apart, standard: &standard, rows: &rows };
        // 30 images in batches of 8: the last has 6.
        let sgd = Sgd { lr: 0.3, epochs: 3, batch: 8 };
        let fitted = fit::<f64>(taken, &labels, 4, sgd, order);
        close(fitted.weights.iter().copied(), &golden("probe.weights").1, 1e-6);
        close(fitted.bias.iter().copied(), &golden("probe.bias").1, 1e-6);
        close(fitted.losses.iter().copied(), &golden("probe.losses").1, 1e-6);

        // The precision that is used.
        let fitted = fit::<f32>(taken, &labels, 4, sgd, order);
        let logits = fitted.logits(golden("others").1.chunks(width), &standard);
        close(logits.into_iter().map(f64::from), &golden("probe.logits").1, 1e-5);
    }

    #[test]
    fn a_step_by_hand() {
        // From zeros both classes have 1/2: the gradient of the image's class is −x / 2.
        let sgd = Sgd { lr: 0.5, epochs: 1, batch: 1 };
        let standard = Standard { mean: vec![0.0; 2], deviation: vec![1.0; 2] };
        let images = Images { features: &[3.0, -1.0], standard: &standard, rows: &[0] };
        let fitted = fit::<f64>(images, &[1], 2, sgd, |_| vec![0]);
        assert_eq!(fitted.weights, [-0.75, 0.25, 0.75, -0.25]);
        assert_eq!(fitted.bias, [-0.25, 0.25]);
        assert!((fitted.losses[0] - 2f64.ln()).abs() < 1e-15);
    }
}
