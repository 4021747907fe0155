//! Losses of pairs of images and texts. As for [`loss`](super::loss), value and gradients come from one op, and the
//! caller starts the backward pass from all of them, parameters included:
//!
//! `graph.backward(&[(images, loss.dimages), (texts, loss.dtexts), (scale, loss.dscale)])`
//!
//! The formulas stand in [`cpu::contrastive`]; the gradient is that of
//! `loss_scale · Σ per_pair`.

use super::device::{Element, Launch, Site};
use super::graph::{Extent, Graph, Node, Tensor};
use super::op::{Io, Op, Workload, on_cpu};
use crate::cpu;
use crate::cpu::contrastive::Results;
use crate::error::Result;
use crate::kernels::contrastive::{Contrastive as Kernel, Operands};
use crate::ops::ContrastiveKind;

/// What the loss op hands out.
#[derive(Clone, Copy, Debug)]
pub struct ContrastiveLoss {
    /// `[N, 1]`: weight × loss of each pair.
    pub per_pair: Tensor,
    /// `[N, D]`: gradient by the images' vectors.
    pub dimages: Tensor,
    /// `[N, D]`: gradient by the texts' vectors.
    pub dtexts: Tensor,
    /// `[1, 1]`: gradient by the scale.
    pub dscale: Tensor,
    /// `[1, 1]`: gradient by the bias, where there is one.
    pub dbias: Option<Tensor>,
}

/// The loss of `images[N, D]` and `texts[N, D]`, pooled vectors before normalisation, of which those with the same
/// row are pairs. `scale[1]` is the logarithm of the factor on the scores; `bias[1]` is added to them.
///
/// # Panics
/// If the shapes differ, or there is a bias without sigmoid: it cancels in a softmax.
pub fn contrastive(
    graph: &mut Graph,
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Option<Tensor>,
    kind: ContrastiveKind,
) -> ContrastiveLoss {
    let (of_images, of_texts) = (graph.info(images), graph.info(texts));
    let (rows, extent) = (of_images.rows, of_images.extent);
    assert_eq!((rows, of_images.cols), (of_texts.rows, of_texts.cols), "images and texts are pairs");
    assert!(bias.is_none() || kind == ContrastiveKind::Sigmoid, "a bias cancels in a softmax");
    let per_pair = graph.activation(rows, 1, extent);
    let dimages = graph.activation_like(images);
    let dtexts = graph.activation_like(texts);
    let dscale = graph.activation(1, 1, Extent::Fixed);
    let dbias = bias.map(|_| graph.activation(1, 1, Extent::Fixed));
    graph.record(
        Contrastive { kind },
        vec![Some(images), Some(texts), Some(scale), bias],
        vec![Some(per_pair), Some(dimages), Some(dtexts), Some(dscale), dbias],
    );
    ContrastiveLoss { per_pair, dimages, dtexts, dscale, dbias }
}

#[derive(Debug)]
struct Contrastive {
    kind: ContrastiveKind,
}

impl Op for Contrastive {
    fn name(&self) -> &'static str {
        match self.kind {
            ContrastiveKind::Softmax => "softmax contrastive loss",
            ContrastiveKind::Sigmoid => "sigmoid contrastive loss",
        }
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let results = Results {
                per_pair: a.output(0),
                dimages: a.output(1),
                dtexts: a.output(2),
                dscale: &mut a.output(3)[0],
                dbias: a.output_opt(4).map(|dbias| &mut dbias[0]),
            };
            let (images, texts) = (a.input(0), a.input(1));
            let (scale, bias) = (a.input(2)[0], a.input_opt(3).map(|bias| bias[0]));
            let (weights, loss_scale) = (&a.batch.weights[..], a.step.loss_scale);
            cpu::contrastive::contrastive(
                results, images, texts, scale, bias, weights, self.kind, loss_scale,
            );
        });
    }

    /// Losses and the gradients of parameters.
    fn element(&self, i: usize) -> Element {
        if i == 1 || i == 2 { Element::Bf16 } else { Element::F32 }
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (images, texts) = (site.input(0)?, site.input(1)?);
        let (scale, bias) = (site.input_f32(2)?, site.input_f32(3)?);
        let (per_pair, dscale, dbias) = (site.output_f32(0)?, site.output_f32(3)?, site.output_f32(4)?);
        let (dimages, dtexts) = (site.output(1)?, site.output(2)?);
        let (scale, per_pair) = (site.present(scale)?, site.present(per_pair)?);
        let dscale = site.present(dscale)?;
        let loss = Kernel { kind: self.kind, pairs: images.rows, width: images.cols };
        site.workspace(loss.workspace()?.bytes());
        Ok(Box::new(move |step| {
            let operands = Operands {
                images: images.all(),
                texts: texts.all(),
                weights: &step.batch.weights,
                scale: &scale,
                bias: bias.as_ref(),
                loss_scale: Some(&step.batch.loss_scale),
                per_pair: &per_pair,
                dimages: dimages.all(),
                dtexts: dtexts.all(),
                dscale: &dscale,
                dbias: dbias.as_ref(),
                rank: Some(step.rank),
            };
            loss.launch(step.stream, &operands, step.workspace)
        }))
    }

    fn scratch(&self, graph: &Graph, node: &Node, _: &[bool]) -> usize {
        let images = graph.info(node.input(0));
        cpu::contrastive::scratch(images.rows, images.cols)
    }

    /// Scores, and the two products of their gradient.
    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        3.0 * 2.0 * work.images * work.images * graph.info(node.input(0)).cols as f64
    }
}
