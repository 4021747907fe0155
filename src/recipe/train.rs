//! Optimiser, schedule, saving, evaluation.

use serde::{Deserialize, Serialize};

use super::LossKind;

choice! {
    /// Shape of the learning rate after warm-up.
    ScheduleKind {
        /// Half a cosine to `lr_min`.
        Cosine = "cosine",
        /// A straight line to `lr_min`.
        Linear = "linear",
        /// Flat.
        Constant = "constant",
        /// `1/√(1 + (t − warmup)/timescale)`, with a linear cool-down.
        Rsqrt = "rsqrt",
    }
}

choice! {
    /// How parameters follow their gradients.
    OptimizerKind {
        /// Adam with decoupled weight decay.
        AdamW = "adamw",
        /// The same step of every parameter that decays, scaled to the parameter's norm.
        Lamb = "lamb",
        /// Gradient descent with momentum.
        Sgd = "sgd",
        /// Steps scaled by second moments of which rows and columns of a matrix keep the means alone.
        Adafactor = "adafactor",
    }
}

choice! {
    /// How checkpoints are written.
    SaveKind {
        /// One file, which the first rank writes.
        Merged = "merged",
        /// Every rank writes a file of its own, beside an index: the faster for large models on several ranks.
        Sharded = "sharded",
    }
}

choice! {
    /// What the CPU device multiplies matrices in; sums, and all between products, are f32.
    MatmulKind {
        /// f32.
        F32 = "f32",
        /// Operands rounded to bf16, as a GPU does: the faster where the processor has AMX.
        Bf16 = "bf16",
    }
}

/// Optimiser, schedule, saving.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimiser steps.
    pub steps: u64,
    /// Batches whose gradients are accumulated into one step.
    pub accumulate: usize,
    /// Seed of every random decision.
    pub seed: u64,
    /// Optimiser.
    pub optimizer: OptimizerKind,
    /// Peak learning rate.
    pub lr: f64,
    /// Final learning rate of `cosine` and `linear`.
    pub lr_min: f64,
    /// Schedule after warm-up.
    pub schedule: ScheduleKind,
    /// Warm-up steps.
    pub warmup: u64,
    /// Cool-down steps to zero at the end (`rsqrt`, `constant`).
    pub cooldown: u64,
    /// Timescale of `rsqrt` in steps; 0 takes the warm-up.
    pub timescale: u64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Weight decay of the head; negative takes `weight_decay`.
    pub head_weight_decay: f64,
    /// β1: how much of the first moment, or momentum, a step keeps.
    pub beta1: f64,
    /// β2: how much of the second moment a step keeps; `adafactor`: at most.
    pub beta2: f64,
    /// `adafactor`: step t keeps 1 − t^−power of the second moment, up to β2.
    pub beta2_power: f64,
    /// Nesterov momentum (`sgd`).
    pub nesterov: bool,
    /// ε, added to the root of the second moment (`adamw`, `lamb`).
    pub eps: f64,
    /// Largest global gradient norm; 0 does not clip.
    pub clip: f64,
    /// Decay of the exponential moving average of the weights; 0 keeps none.
    pub ema: f64,
    /// Precision of the operands of matrix products on a CPU; a GPU's are bf16.
    pub matmul: MatmulKind,
    /// Loss.
    pub loss: LossKind,
    /// Label smoothing.
    pub label_smoothing: f64,
    /// Steps between evaluations; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Steps between saves of `last`; 0 saves at evaluations only.
    pub save_every: u64,
    /// Steps between kept checkpoints `step-N`; 0 keeps none but best and last.
    pub keep_every: u64,
    /// One file for a checkpoint, or one a rank; either loads on any mesh.
    pub save_as: SaveKind,
    /// Steps between metric lines.
    pub log_every: u64,
    /// Whether each evaluation also logs the attention of a few validation images: entropies and largest logits by block.
    pub log_attention: bool,
}

/// Evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Resolution at evaluation; 0 takes `resolution.max`.
    pub resolution: usize,
    /// Crop ratio: the shorter side is resized to the resolution divided by this, and the square in the middle is cut
    /// out; 0 resizes the whole image.
    pub crop: f64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            accumulate: 1,
            seed: 0,
            optimizer: OptimizerKind::AdamW,
            lr: 1e-3,
            lr_min: 1e-5,
            schedule: ScheduleKind::Cosine,
            warmup: 100,
            cooldown: 0,
            timescale: 0,
            weight_decay: 0.05,
            head_weight_decay: -1.0,
            beta1: 0.9,
            beta2: 0.999,
            beta2_power: 0.8,
            nesterov: false,
            eps: 1e-8,
            clip: 1.0,
            ema: 0.0,
            matmul: MatmulKind::F32,
            loss: LossKind::Softmax,
            label_smoothing: 0.0,
            eval_every: 0,
            save_every: 0,
            keep_every: 0,
            save_as: SaveKind::Merged,
            log_every: 10,
            log_attention: false,
        }
    }
}
