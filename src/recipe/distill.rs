//! Knowledge distillation.

use serde::{Deserialize, Serialize};

use super::validate::require;
use super::{DropKind, FitKind, LossKind, Recipe};
use crate::Result;
use crate::ops::ClassificationLoss;

/// Knowledge distillation from a consistent teacher (Beyer et al., arXiv 2106.05237): it sees every batch as the student
/// sees it, the same crops, mixed images and dropped tokens, and its probabilities are the student's targets. What is
/// minimised is KL(teacher ‖ student), whose gradient is that of the cross-entropy that the run tells: the two differ by
/// the teacher's entropy. Its logits are computed as they are needed, or read where a run has stored them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// The teacher: a run's folder, a checkpoint, or weights of another library; empty trains on the labels alone.
    pub teacher: String,
    /// A folder where the teacher's logits are kept. Those of images that it holds, in the view that an epoch has of
    /// them, are read instead of asking the teacher; others are added, or without `teacher` an error.
    pub store: String,
    /// Share of the teacher in the targets; the rest is that of the labels.
    pub weight: f64,
    /// T: probabilities of both are those of logits / T, and the loss is multiplied by T² (Hinton et al., arXiv
    /// 1503.02531). Other than 1 at `weight = 1` alone, as labels know none.
    pub temperature: f64,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self { teacher: String::new(), store: String::new(), weight: 1.0, temperature: 1.0 }
    }
}

impl DistillConfig {
    /// Whether there is a teacher.
    pub fn is_on(&self) -> bool {
        !self.teacher.is_empty() || !self.store.is_empty()
    }
}

impl Recipe {
    /// The loss of a step. With a teacher the labels alone are smoothed, before they are joined with its probabilities.
    pub fn classification_loss(&self) -> ClassificationLoss {
        let (kind, smoothing) = (self.train.loss, self.train.label_smoothing);
        match self.distill.is_on() {
            true => ClassificationLoss { temperature: self.distill.temperature, ..kind.into() },
            false => ClassificationLoss { smoothing, ..kind.into() },
        }
    }

    pub(super) fn validate_distill(&self) -> Result<()> {
        let (distill, train) = (&self.distill, &self.train);
        require(distill.weight > 0.0 && distill.weight <= 1.0, || {
            format!("distill.weight must be above 0 and at most 1, but it is {}", distill.weight)
        })?;
        require((0.01..=1000.0).contains(&distill.temperature), || {
            format!("distill.temperature must lie in 0.01..1000, but it is {}", distill.temperature)
        })?;
        if !distill.is_on() {
            return Ok(());
        }
        require(distill.temperature == 1.0 || distill.weight == 1.0, || {
            format!(
                "distill.temperature = {} is for the teacher's probabilities alone, and distill.weight = {} leaves a \
                 share to the labels; set one of them to 1",
                distill.temperature, distill.weight
            )
        })?;
        let (key, value) = match distill.teacher.is_empty() {
            true => ("distill.store", &distill.store),
            false => ("distill.teacher", &distill.teacher),
        };
        require(train.loss == LossKind::Softmax, || {
            format!(
                "{key} = \"{value}\" gives probabilities that sum to 1: it needs train.loss = \"softmax\"; set one of \
                 them"
            )
        })?;
        for (other, depends) in [
            ("packing.fit", self.packing.fit != FitKind::None),
            ("drop.kind = \"schedule\"", self.drop.kind == DropKind::Schedule),
        ] {
            require(distill.store.is_empty() || !depends, || {
                format!(
                    "distill.store = \"{}\" keeps logits by image and epoch, and with {other} what is seen of an image \
                     depends on its batch too; set one of them back",
                    distill.store
                )
            })?;
        }
        require(distill.weight < 1.0 || train.label_smoothing == 0.0, || {
            format!(
                "train.label_smoothing = {} has no labels to smooth at distill.weight = 1; set one of them",
                train.label_smoothing
            )
        })
    }
}
