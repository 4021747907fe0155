//! AdamW (Loshchilov & Hutter 2019), gradient norm, moving average.

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

/// One step in place on parameter `p`, moments `m` and `v`.
pub fn adamw(config: &AdamW, p: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32]) {
    todo!()
}

/// Σ g² in f64, in fixed chunks.
pub fn sum_of_squares(grad: &[f32]) -> f64 {
    todo!()
}

/// `average = decay·average + (1 − decay)·p`.
pub fn moving_average(average: &mut [f32], p: &[f32], decay: f64) {
    todo!()
}
