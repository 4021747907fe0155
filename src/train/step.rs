//! One training step as it is recorded: forward, loss and backward of a packed batch.

use crate::autograd::graph::{Graph, ParamSpec, Tensor};
use crate::autograd::loss::{self, Loss};
use crate::autograd::{Plan, Shard, Workload};
use crate::error::Result;
use crate::models::vit;
use crate::recipe::{LossKind, Recipe};

/// A recorded training step; an [`engine`](super::engine) runs it.
pub struct TrainStep {
    graph: Graph,
    plan: Plan,
    loss: Loss,
    logits: Tensor,
    classes: usize,
    loss_kind: LossKind,
    /// The forward pass alone.
    forward: Graph,
    /// The same of the whole model, for model FLOPs, where the step is of a part.
    whole: Option<Graph>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Mean loss over the images with weight.
    pub loss: f64,
    /// Share of the images that were recognised, 0 to 1.
    pub accuracy: f64,
    /// Global gradient norm before clipping. Where it is not finite, nothing was updated.
    pub grad_norm: f64,
    /// Images with weight.
    pub images: u64,
    /// Live tokens.
    pub tokens: usize,
    /// Token budget, padding included.
    pub budget: usize,
    /// Model FLOPs: three times the forward pass, recomputation not counted.
    pub flops: f64,
    /// Seconds for which the device had nothing to do before this step; none where the step began with its call.
    pub idle: Option<f64>,
}

impl TrainStep {
    /// Records the step of `recipe` with `slots` image slots.
    ///
    /// # Errors
    /// If the model's shape is invalid.
    pub fn new(recipe: &Recipe, classes: usize, slots: usize) -> Result<Self> {
        Self::of_shard(recipe, classes, slots, Shard::WHOLE)
    }

    /// What `shard` of the tensor axis computes of it.
    ///
    /// # Errors
    /// If the model's shape is invalid, or cannot be shared out.
    pub fn of_shard(recipe: &Recipe, classes: usize, slots: usize, shard: Shard) -> Result<Self> {
        let tokens = recipe.packing.tokens;
        let mut graph = Graph::of_shard(shard);
        let outputs = vit::record(&mut graph, recipe, classes, tokens, slots, true)?;
        let forward = graph.clone();
        let whole = match shard.is_part() {
            true => {
                let mut whole = Graph::new();
                vit::record(&mut whole, recipe, classes, tokens, slots, true)?;
                Some(whole)
            }
            false => None,
        };
        let loss = loss::classification(&mut graph, outputs.logits, recipe.classification_loss());
        graph.backward(&[(outputs.logits, loss.dlogits)]);
        graph.keep(loss.per_image);
        graph.keep(outputs.logits);
        let plan = Plan::new(&graph);
        let (logits, loss_kind) = (outputs.logits, recipe.train.loss);
        Ok(Self { plan, loss, logits, classes, loss_kind, forward, whole, graph })
    }

    /// The recorded step.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Liveness and memory of the step.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// `[N]`, kept: the weighted loss of each image.
    pub fn per_image(&self) -> Tensor {
        self.loss.per_image
    }

    /// `[N, classes]`, kept.
    pub fn logits(&self) -> Tensor {
        self.logits
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// The loss.
    pub fn loss_kind(&self) -> LossKind {
        self.loss_kind
    }

    /// The forward pass alone, as an evaluation of such a batch runs it.
    pub fn evaluation(&self) -> Graph {
        let mut forward = self.forward.clone();
        forward.keep(self.logits);
        forward
    }

    /// The parameters in order.
    pub fn params(&self) -> &[ParamSpec] {
        self.graph.params()
    }

    /// Model FLOPs of one step over a batch of this workload, those of all ranks of the tensor axis.
    pub fn flops(&self, work: &Workload) -> f64 {
        3.0 * self.whole.as_ref().unwrap_or(&self.forward).flops(work)
    }
}
