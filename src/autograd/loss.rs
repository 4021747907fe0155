//! Losses. Value and gradient come from one pass, so the op hands out both and the caller starts
//! the backward pass from them: `graph.backward(&[(logits, loss.dlogits)])`.
//!
//! Softmax: `dlogits = p − t`; sigmoid: `dlogits = σ(x) − t`; both times the image's weight, the step's loss scale and
//! [`ClassificationLoss::slope`].

use super::device::batch::Labels;
use super::device::{Element, Launch, Site};
use super::graph::{Graph, Tensor};
use super::op::{Io, Op, on_cpu};
use crate::cpu;
use crate::error::Result;
use crate::kernels::loss::{CrossEntropy, Logits, Operands, Targets};
use crate::ops::{ClassificationLoss, LossKind};

/// What the loss op hands out.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    /// `[N, 1]`: weight × loss of each image.
    pub per_image: Tensor,
    /// `[N, K]`: gradient of `loss_scale · Σ per_image`.
    pub dlogits: Tensor,
}

/// The loss of `logits[N, K]` against the batch's targets.
pub fn classification(graph: &mut Graph, logits: Tensor, of: ClassificationLoss) -> Loss {
    let info = graph.info(logits);
    let (rows, extent) = (info.rows, info.extent);
    let per_image = graph.activation(rows, 1, extent);
    let dlogits = graph.activation_like(logits);
    graph.record(Classification(of), vec![Some(logits)], vec![Some(per_image), Some(dlogits)]);
    Loss { per_image, dlogits }
}

#[derive(Debug)]
struct Classification(ClassificationLoss);

impl Op for Classification {
    fn name(&self) -> &'static str {
        match self.0.kind {
            LossKind::Softmax => "softmax cross-entropy",
            LossKind::Sigmoid | LossKind::Bce => "sigmoid cross-entropy",
        }
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let classes = a.input_shape(0).1;
            let (loss, dlogits, logits) = (a.output(0), a.output(1), a.input(0));
            let (targets, weights) = (&a.batch.targets, &a.batch.weights[..]);
            let scale = a.step.loss_scale;
            cpu::loss::cross_entropy(self.0, loss, dlogits, logits, targets, weights, classes, scale);
        });
    }

    /// The loss of each image.
    fn element(&self, i: usize) -> Element {
        if i == 0 { Element::F32 } else { Element::Bf16 }
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (logits, loss, dlogits) = (site.input(0)?, site.output_f32(0)?, site.output(1)?);
        let loss = site.present(loss)?;
        let cross_entropy = CrossEntropy { of: self.0, images: logits.rows, classes: site.input_cols(0) };
        Ok(Box::new(move |step| {
            let operands = Operands {
                logits: Logits::Bf16(logits.all()),
                targets: match &step.batch.targets {
                    Labels::Classes(labels) => Targets::Classes(labels),
                    Labels::Soft(soft) => Targets::Soft(soft),
                },
                weights: &step.batch.weights,
                scale: Some(&step.batch.loss_scale),
                loss: &loss,
                dlogits: dlogits.all(),
                rank: Some(step.rank),
                error: Some(step.label_fault),
            };
            cross_entropy.launch(step.stream, &operands)
        }))
    }
}
