//! One training step: forward, loss and backward over one or more packed batches.

use crate::autograd::graph::{Graph, ParamSpec, Tensor};
use crate::autograd::loss::{self, Loss};
use crate::autograd::{CpuExecutor, Plan, StepState, Workload};
use crate::data::batch::PackedBatch;
use crate::error::Result;
use crate::eval::metrics::Classification;
use crate::eval::run::labels;
use crate::models::vit;
use crate::recipe::{LossKind, Recipe};

/// A recorded training step with the gradients it fills.
pub struct TrainStep {
    graph: Graph,
    plan: Plan,
    executor: CpuExecutor<f32>,
    grads: Vec<Vec<f32>>,
    loss: Loss,
    logits: Tensor,
    classes: usize,
    loss_kind: LossKind,
    /// The forward pass alone, for model FLOPs.
    forward: Graph,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Mean loss over the images with weight.
    pub loss: f64,
    /// Share of the images that were recognised, 0 to 1.
    pub accuracy: f64,
    /// Images with weight.
    pub images: u64,
    /// Live tokens.
    pub tokens: usize,
    /// Token budget, padding included.
    pub budget: usize,
    /// Model FLOPs: three times the forward pass, recomputation not counted.
    pub flops: f64,
}

impl TrainStep {
    /// Records the step of `recipe` with `slots` image slots.
    ///
    /// # Errors
    /// If the model's shape is invalid.
    pub fn new(recipe: &Recipe, classes: usize, slots: usize) -> Result<Self> {
        let tokens = recipe.packing.tokens;
        let mut graph = Graph::new();
        let outputs = vit::record(&mut graph, recipe, classes, tokens, slots, true)?;
        let forward = graph.clone();
        let loss =
            loss::classification(&mut graph, outputs.logits, recipe.train.loss, recipe.train.label_smoothing);
        graph.backward(&[(outputs.logits, loss.dlogits)]);
        graph.keep(loss.per_image);
        graph.keep(outputs.logits);
        let plan = Plan::new(&graph);
        Ok(Self {
            plan,
            grads: Vec::new(),
            executor: CpuExecutor::new(),
            loss,
            logits: outputs.logits,
            classes,
            loss_kind: recipe.train.loss,
            forward,
            graph,
        })
    }

    /// The recorded step.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Liveness and memory of the step.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Most elements of activations that an evaluation of such a batch holds at one time.
    pub fn evaluation_elements(&self) -> usize {
        let mut forward = self.forward.clone();
        forward.keep(self.logits);
        Plan::new(&forward).peak_elements
    }

    /// The parameters in order.
    pub fn params(&self) -> &[ParamSpec] {
        self.graph.params()
    }

    /// Gradients of the last step, in the order of the parameters.
    pub fn grads(&self) -> &[Vec<f32>] {
        &self.grads
    }

    /// Model FLOPs of one step over a batch of this workload.
    pub fn flops(&self, work: &Workload) -> f64 {
        3.0 * self.forward.flops(work)
    }

    /// Runs forward and backward over `batches`, whose gradients are summed; the loss is the mean
    /// over all their images.
    pub fn run(&mut self, params: &[Vec<f32>], batches: &[PackedBatch], seed: u64) -> StepOutcome {
        if self.grads.is_empty() {
            self.grads = self.graph.params().iter().map(|p| vec![0.0; p.len()]).collect();
        }
        for grad in &mut self.grads {
            grad.fill(0.0);
        }
        let weight: f64 = batches.iter().flat_map(|b| &b.weights).map(|w| f64::from(*w)).sum();
        let step = StepState { seed, loss_scale: 1.0 / weight.max(1.0) };
        let mut outcome = StepOutcome::default();
        let mut counts = Classification::new(self.classes, self.loss_kind);
        for batch in batches {
            let feeds = Default::default();
            self.executor.run(&self.graph, &self.plan, params, &mut self.grads, &feeds, batch, &step);
            let per_image = self.executor.value(self.loss.per_image);
            outcome.loss += per_image.iter().map(|l| f64::from(*l)).sum::<f64>() * step.loss_scale;
            counts.add(self.executor.value(self.logits), &labels(batch), &batch.weights);
            outcome.tokens += batch.live_tokens();
            outcome.budget += batch.tokens();
            outcome.flops += self.flops(&Workload::of(batch));
        }
        let report = counts.report();
        (outcome.accuracy, outcome.images) = (report.top1, report.images);
        outcome
    }
}
