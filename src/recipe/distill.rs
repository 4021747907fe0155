//! Knowledge distillation.

use serde::{Deserialize, Serialize};

use super::validate::require;
use super::{LossKind, Recipe};
use crate::Result;

/// Knowledge distillation from a consistent teacher (Beyer et al., arXiv 2106.05237): it sees every batch as the student
/// sees it, the same crops, mixed images and dropped tokens, and its probabilities are the student's targets. What is
/// minimised is KL(teacher ‖ student) at temperature 1, whose gradient is that of the cross-entropy that the run tells:
/// the two differ by the teacher's entropy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// The teacher: a run's folder, a checkpoint, or weights of another library; empty trains on the labels alone.
    pub teacher: String,
    /// Share of the teacher in the targets; the rest is that of the labels.
    pub weight: f64,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self { teacher: String::new(), weight: 1.0 }
    }
}

impl DistillConfig {
    /// Whether there is a teacher.
    pub fn is_on(&self) -> bool {
        !self.teacher.is_empty()
    }
}

impl Recipe {
    /// Label smoothing that is left to the loss: with a teacher the labels alone are smoothed, before they are joined
    /// with its probabilities.
    pub fn loss_smoothing(&self) -> f64 {
        if self.distill.is_on() { 0.0 } else { self.train.label_smoothing }
    }

    pub(super) fn validate_distill(&self) -> Result<()> {
        let (distill, train) = (&self.distill, &self.train);
        require(distill.weight > 0.0 && distill.weight <= 1.0, || {
            format!("distill.weight must be above 0 and at most 1, but it is {}", distill.weight)
        })?;
        if !distill.is_on() {
            return Ok(());
        }
        require(train.loss == LossKind::Softmax, || {
            format!(
                "distill.teacher = \"{}\" gives probabilities that sum to 1: it needs train.loss = \"softmax\"; set \
                 one of them",
                distill.teacher
            )
        })?;
        require(distill.weight < 1.0 || train.label_smoothing == 0.0, || {
            format!(
                "train.label_smoothing = {} has no labels to smooth at distill.weight = 1; set one of them",
                train.label_smoothing
            )
        })
    }
}
