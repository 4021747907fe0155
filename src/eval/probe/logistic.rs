//! Multinomial logistic regression by stochastic gradient descent with momentum: a linear probe.
//!
//! From zeros, over batches of standardised features x with the mean gradient of −log softmax(Wx + b)\[class\]:
//! v ← m·v + g, w ← w − η·v (as PyTorch's SGD), the learning rate η following half a cosine from its peak to 0.

use super::Standard;
use crate::cpu::gemm::{bias_grad, linear, linear_weight_grad};
use crate::cpu::real::Real;

/// Momentum m.
pub const MOMENTUM: f64 = 0.9;

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

/// Fits it to `x` `[images, width]`, standardised, and `labels`. `order(epoch)` is the order in which that epoch takes the
/// images.
pub fn fit<R: Real>(
    x: &[R],
    labels: &[usize],
    [width, classes]: [usize; 2],
    sgd: Sgd,
    order: impl Fn(usize) -> Vec<usize>,
) -> Fitted<R> {
    let images = labels.len();
    let (batch, total) = (sgd.batch.max(1), sgd.epochs * images.div_ceil(sgd.batch.max(1)));
    let (mut weights, mut bias) = (vec![R::ZERO; classes * width], vec![R::ZERO; classes]);
    let (mut weights_velocity, mut bias_velocity) = (weights.clone(), bias.clone());
    let mut losses = Vec::with_capacity(sgd.epochs);
    let mut step = 0;
    for epoch in 0..sgd.epochs {
        let mut loss = 0.0;
        for rows in order(epoch).chunks(batch) {
            let taken: Vec<R> = rows.iter().flat_map(|&row| &x[row * width..][..width]).copied().collect();
            let mut logits = vec![R::ZERO; rows.len() * classes];
            linear(&mut logits, &taken, &weights, Some(&bias), width, classes);
            for (logits, &row) in logits.chunks_exact_mut(classes).zip(rows) {
                loss += softmax_grad(logits, labels[row], rows.len());
            }
            // Momentum first: what follows adds the gradients.
            let scaled = |velocity: &mut [R]| velocity.iter_mut().for_each(|v| *v *= R::of(MOMENTUM));
            scaled(&mut weights_velocity);
            scaled(&mut bias_velocity);
            linear_weight_grad(&mut weights_velocity, &logits, &taken, width, classes);
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
    /// Logits `[images, K]` of `features` `[images, D]` as they are, which `standard` standardises.
    pub fn logits(&self, features: &[f32], standard: &Standard) -> Vec<f32> {
        let (width, classes) = (standard.mean.len(), self.bias.len());
        let x: Vec<f32> = standard.apply(features).map(|x| x as f32).collect();
        let mut logits = vec![0.0; x.len() / width * classes];
        linear(&mut logits, &x, &self.weights, Some(&self.bias), width, classes);
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
        let standard = Standard::of(&features, width);
        let x: Vec<f64> = standard.apply(&features).collect();
        // 30 images in batches of 8: the last has 6.
        let sgd = Sgd { lr: 0.3, epochs: 3, batch: 8 };
        let fitted = fit(&x, &labels, [width, 4], sgd, order);
        close(fitted.weights.iter().copied(), &golden("probe.weights").1, 1e-6);
        close(fitted.bias.iter().copied(), &golden("probe.bias").1, 1e-6);
        close(fitted.losses.iter().copied(), &golden("probe.losses").1, 1e-6);

        // The precision that is used.
        let x: Vec<f32> = x.into_iter().map(|x| x as f32).collect();
        let fitted = fit(&x, &labels, [width, 4], sgd, order);
        let logits = fitted.logits(&golden("others").1, &standard);
        close(logits.into_iter().map(f64::from), &golden("probe.logits").1, 1e-5);
    }

    #[test]
    fn a_step_by_hand() {
        // From zeros both classes have 1/2: the gradient of the image's class is −x / 2.
        let sgd = Sgd { lr: 0.5, epochs: 1, batch: 1 };
        let fitted = fit(&[3.0, -1.0], &[1], [2, 2], sgd, |_| vec![0]);
        assert_eq!(fitted.weights, [-0.75, 0.25, 0.75, -0.25]);
        assert_eq!(fitted.bias, [-0.25, 0.25]);
        assert!((fitted.losses[0] - 2f64.ln()).abs() < 1e-15);
    }
}
