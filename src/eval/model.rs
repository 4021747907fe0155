//! A model that only runs forward.

use crate::autograd::graph::{Graph, ParamSpec};
use crate::autograd::{CpuExecutor, Plan, StepState, Workload};
use crate::data::batch::PackedBatch;
use crate::error::Result;
use crate::models::vit::{self, Outputs};
use crate::recipe::Recipe;

/// A recorded forward pass.
pub struct Model {
    graph: Graph,
    plan: Plan,
    executor: CpuExecutor<f32>,
    outputs: Outputs,
    classes: usize,
}

impl Model {
    /// Records the model of `recipe` for batches of `tokens` tokens and `slots` images.
    /// `features_too` keeps tokens and pooled vectors besides the logits.
    ///
    /// # Errors
    /// If the model's shape is invalid.
    pub fn new(
        recipe: &Recipe,
        classes: usize,
        tokens: usize,
        slots: usize,
        features_too: bool,
    ) -> Result<Self> {
        let mut graph = Graph::new();
        let outputs = vit::record(&mut graph, recipe, classes, tokens, slots, false)?;
        graph.keep(outputs.logits);
        if features_too {
            graph.keep(outputs.tokens);
            graph.keep(outputs.features);
        }
        let plan = Plan::new(&graph);
        Ok(Self { graph, plan, executor: CpuExecutor::new(), outputs, classes })
    }

    /// The parameters in order.
    pub fn params(&self) -> &[ParamSpec] {
        self.graph.params()
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// FLOPs of a forward pass over this workload.
    pub fn flops(&self, work: &Workload) -> f64 {
        self.graph.flops(work)
    }

    /// Runs the batch and returns the logits `[N, classes]`, zero on unused slots.
    pub fn run(&mut self, params: &[Vec<f32>], batch: &PackedBatch) -> &[f32] {
        let (feeds, step) = (Default::default(), StepState::default());
        self.executor.run(&self.graph, &self.plan, params, &mut [], &feeds, batch, &step);
        self.executor.value(self.outputs.logits)
    }

    /// Tokens `[T, D]` of the last run.
    ///
    /// # Panics
    /// If the model was recorded without `features_too`.
    pub fn tokens(&self) -> &[f32] {
        self.executor.value(self.outputs.tokens)
    }

    /// Pooled vectors `[N, D]` of the last run; panics as [`Model::tokens`] does.
    pub fn features(&self) -> &[f32] {
        self.executor.value(self.outputs.features)
    }
}
