//! What a step of the optimiser is told and what it tells, in device memory; mirrors of
//! `kernels/optim/step.cuh`.

use bytemuck::{Pod, Zeroable};

/// What the host writes before a step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct OptimizerStep {
    /// Learning rate.
    pub lr: f64,
    /// β1, at least 0 and less than 1.
    pub beta1: f64,
    /// β2, at least 0 and less than 1; of Adafactor the most that a step keeps.
    pub beta2: f64,
    /// Adafactor: step t keeps `1 − t^−power` of the second moments; above 0.
    pub beta2_power: f64,
    /// ε, added to √v̂; more than 0.
    pub eps: f64,
    /// Largest global gradient norm; 0 does not clip.
    pub clip: f64,
    /// Decay of the moving average.
    pub ema_decay: f64,
    /// Sum of the loss weights of the step: the gradients, of which every image added its own, are divided by it. 0
    /// divides by 1.
    pub images: f64,
    /// Key of stochastic rounding.
    pub seed: u64,
    /// Not 0 where gradients are added to those of the batch before.
    pub continues: i32,
    /// Not 0 where another batch follows: nothing is updated yet.
    pub unfinished: i32,
}

/// What the kernels write. A new run begins with zeros; one that is resumed sets [`step`](Self::step).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct OptimizerState {
    /// Steps taken.
    pub step: u64,
    /// Steps left out because a gradient was not finite.
    pub skipped: u64,
    /// Norm of the last gradients, divided by the images, before clipping; infinite or NaN where the step was left out.
    pub norm: f64,
    /// Learning rate of the last step taken.
    pub lr: f64,
    /// What the elements need.
    pub factors: Factors,
}

/// The numbers of a step, rounded once from f64.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct Factors {
    /// Not 0 where the last step was left out, or is not finished.
    pub skip: i32,
    /// Factor on the gradients: division by the images, and clipping.
    pub grad_scale: f32,
    /// `1 / (1 − β1ᵗ)`.
    pub inverse1: f32,
    /// `lr / (1 − β1ᵗ)`.
    pub rate: f32,
    /// `1 / √(1 − β2ᵗ)`.
    pub root2: f32,
    /// β1.
    pub keep1: f32,
    /// 1 − β1.
    pub new1: f32,
    /// β2.
    pub keep2: f32,
    /// 1 − β2.
    pub new2: f32,
    /// ε.
    pub eps: f32,
    /// 1 − decay of the moving average.
    pub new_average: f32,
    /// Fills the struct.
    pub unused: i32,
}
