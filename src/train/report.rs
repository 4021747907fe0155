//! What a step and an evaluation tell: the source of the progress display, the metric lines and
//! the TensorBoard events.

use serde::Serialize;

/// One optimiser step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepReport {
    /// Steps that have been completed, this one included.
    #[serde(skip)]
    pub step: u64,
    /// Mean training loss of the step's images.
    pub loss: f64,
    /// Share of the step's images that were recognised, 0 to 1.
    pub accuracy: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Images of the step.
    pub images: u64,
    /// Tokens of the step that belong to an image.
    pub tokens: u64,
    /// Token rows of the step, padding included.
    pub token_rows: u64,
    /// Arithmetic of the step that the model calls for, in FLOP.
    pub flop: f64,
    /// Wall time of the step in seconds; the one field that differs between equal runs.
    pub seconds: f64,
}

impl StepReport {
    /// Share of token rows that is padding, 0 to 1.
    pub fn padding(&self) -> f64 {
        if self.token_rows == 0 { 0.0 } else { 1.0 - self.tokens as f64 / self.token_rows as f64 }
    }
}

/// One evaluation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct EvalReport {
    /// Optimiser steps before the evaluation.
    #[serde(skip)]
    pub step: u64,
    /// Mean loss.
    pub loss: f64,
    /// Top-1 accuracy, 0 to 1.
    pub top1: f64,
    /// Top-5 accuracy, 0 to 1.
    pub top5: f64,
    /// Images evaluated.
    pub images: u64,
    /// Whether this is the best accuracy of the run so far.
    pub best: bool,
    /// Wall time in seconds; the one field that differs between equal runs.
    pub seconds: f64,
}

/// Attention of every block over the same validation images at each evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AttentionReport {
    /// Optimiser steps before it.
    #[serde(skip)]
    pub step: u64,
    /// Mean entropy over heads, queries and images of each block, in nats.
    pub entropy: Vec<f64>,
    /// That of the head where it is lowest, of each block.
    pub min_head_entropy: Vec<f64>,
    /// Largest scaled score of each block.
    pub max_logit: Vec<f64>,
    /// What the entropy would be if all queries attended to all tokens alike.
    pub uniform_entropy: f64,
    /// Images.
    pub images: u64,
    /// Wall time in seconds; the one field that differs between equal runs.
    pub seconds: f64,
}
