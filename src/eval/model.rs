//! A model that only runs forward, on the CPU device; what evaluations ask of a model on any device.

use std::borrow::{BorrowMut, Cow};
use std::sync::Arc;

use super::towers::Embed;
use crate::autograd::attention::AttentionOperands;
use crate::autograd::graph::{Graph, Kind, ParamSpec, Tensor};
use crate::autograd::pool::PoolOperands;
use crate::autograd::{CpuExecutor, Plan, Rank, Shard, StepState, Workload};
use crate::data::batch::PackedBatch;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::models::vit::{self, Outputs};
use crate::recipe::Recipe;

/// A model with its weights, ready to run.
pub trait Forward {
    /// Number of classes.
    fn classes(&self) -> usize;

    /// FLOPs of a forward pass over this workload.
    fn flops(&self, work: &Workload) -> f64;

    /// Runs the batch and returns the logits `[N, classes]`, zero on unused slots.
    ///
    /// # Errors
    /// A batch of another shape; a failed device.
    fn logits(&mut self, batch: &PackedBatch) -> Result<&[f32]>;

    /// Makes a model of texts tell `classes` by what texts say of them, see [`ZeroShot`](super::zero_shot::ZeroShot).
    ///
    /// # Errors
    /// A model that was trained on classes; texts without a token; a failed device.
    fn set_classes(&mut self, classes: &[String], prompts: &[String]) -> Result<()> {
        let _ = (classes, prompts);
        Err(Error::usage(
            "the model was trained on classes and knows no texts; zero-shot evaluation needs one that was trained with \
             text.tokenizer",
        ))
    }
}

/// A model of which more than the logits can be had.
pub trait Features: Forward {
    /// Runs the batch and returns the pooled vectors `[N, D]`, of no meaning on unused slots.
    ///
    /// # Errors
    /// As for [`Forward::logits`].
    fn pooled(&mut self, batch: &PackedBatch) -> Result<Vec<f32>>;

    /// What the newest run has kept.
    ///
    /// # Errors
    /// A model of texts, which keeps nothing.
    fn observed(&self) -> Result<&dyn Observed>;

    /// The towers and the tokenizer of a model of texts; `None` of another.
    fn towers(&mut self) -> Option<(&mut dyn Embed, Arc<Tokenizer>)> {
        None
    }
}

/// A model whose kept values can be read after a run.
pub trait Observed: Forward {
    /// The recorded pass.
    fn graph(&self) -> &Graph;

    /// All rows of a parameter, or of what was kept of the last run.
    ///
    /// # Errors
    /// A failed device; on one, a tensor that was not kept.
    ///
    /// # Panics
    /// On the CPU, if the tensor was not kept.
    fn value(&self, tensor: Tensor) -> Result<Cow<'_, [f32]>>;
}

impl<F: Forward + ?Sized> Forward for &mut F {
    fn classes(&self) -> usize {
        (**self).classes()
    }

    fn flops(&self, work: &Workload) -> f64 {
        (**self).flops(work)
    }

    fn logits(&mut self, batch: &PackedBatch) -> Result<&[f32]> {
        (**self).logits(batch)
    }

    fn set_classes(&mut self, classes: &[String], prompts: &[String]) -> Result<()> {
        (**self).set_classes(classes, prompts)
    }
}

/// What can be read after a forward pass besides the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    Logits,
    /// Tokens and pooled vectors.
    Features,
    /// What the image's vector attends with: the operands of attention pooling, or of attention in the last block.
    Pooling,
    /// The operands of attention in every block.
    Blocks,
}

impl Keep {
    fn mark(self, graph: &mut Graph, outputs: &Outputs) {
        let kept: Vec<Tensor> = match self {
            Self::Logits => Vec::new(),
            Self::Features => vec![outputs.tokens, outputs.features],
            Self::Pooling => match PoolOperands::of(graph) {
                Some(pool) => vec![pool.q, pool.kv],
                None => AttentionOperands::of(graph).last().map_or_else(Vec::new, activations),
            },
            Self::Blocks => AttentionOperands::of(graph).iter().flat_map(activations).collect(),
        };
        kept.into_iter().for_each(|tensor| graph.keep(tensor));
    }
}

fn activations(attention: &AttentionOperands) -> Vec<Tensor> {
    [Some(attention.qkv), attention.rope].into_iter().flatten().collect()
}

/// What `shard` of the tensor axis computes of the forward pass of `recipe` for batches of `tokens` tokens and
/// `slots` images.
pub(super) fn record(
    recipe: &Recipe,
    classes: usize,
    tokens: usize,
    slots: usize,
    keep: Keep,
    shard: Shard,
) -> Result<(Graph, Outputs)> {
    let mut graph = Graph::of_shard(shard);
    let outputs = vit::record(&mut graph, recipe, classes, tokens, slots, false)?;
    graph.keep(outputs.logits);
    keep.mark(&mut graph, &outputs);
    Ok((graph, outputs))
}

/// The whole model, where `shard` is a part of it.
pub(super) fn whole(
    recipe: &Recipe,
    classes: usize,
    tokens: usize,
    slots: usize,
    shard: Shard,
) -> Result<Option<Graph>> {
    let whole = || record(recipe, classes, tokens, slots, Keep::Logits, Shard::WHOLE).map(|(graph, _)| graph);
    shard.is_part().then(whole).transpose()
}

/// A recorded forward pass on the CPU device.
pub struct Model {
    graph: Graph,
    /// Of the whole model, for FLOPs, where `graph` is of a part.
    whole: Option<Graph>,
    plan: Plan,
    executor: CpuExecutor<f32>,
    outputs: Outputs,
    classes: usize,
}

impl Model {
    /// Records the model of `recipe` for batches of `tokens` tokens and `slots` images.
    ///
    /// # Errors
    /// If the model's shape is invalid.
    pub fn new(recipe: &Recipe, classes: usize, tokens: usize, slots: usize, keep: Keep) -> Result<Self> {
        let (graph, outputs) = record(recipe, classes, tokens, slots, keep, Shard::WHOLE)?;
        Ok(Self::of_graph(recipe, graph, outputs, classes))
    }

    /// What `shard` of the tensor axis computes of it, to be run by [`run_rank`](Self::run_rank).
    ///
    /// # Errors
    /// If the model's shape is invalid, or cannot be shared out.
    pub fn of_shard(
        recipe: &Recipe,
        classes: usize,
        [tokens, slots]: [usize; 2],
        shard: Shard,
    ) -> Result<Self> {
        let (graph, outputs) = record(recipe, classes, tokens, slots, Keep::Logits, shard)?;
        Ok(Self {
            whole: whole(recipe, classes, tokens, slots, shard)?,
            ..Self::of_graph(recipe, graph, outputs, classes)
        })
    }

    fn of_graph(recipe: &Recipe, graph: Graph, outputs: Outputs, classes: usize) -> Self {
        let plan = Plan::new(&graph);
        let executor = CpuExecutor::with_products(recipe.train.matmul);
        Self { graph, whole: None, plan, executor, outputs, classes }
    }

    /// The recorded pass.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Its liveness.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The parameters in order.
    pub fn params(&self) -> &[ParamSpec] {
        self.graph.params()
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// FLOPs of a forward pass over this workload, those of all ranks of the tensor axis.
    pub fn flops(&self, work: &Workload) -> f64 {
        self.whole.as_ref().unwrap_or(&self.graph).flops(work)
    }

    /// Runs the batch and returns the logits `[N, classes]`, zero on unused slots.
    pub fn run(&mut self, params: &[Vec<f32>], batch: &PackedBatch) -> &[f32] {
        let (feeds, step) = (Default::default(), StepState::default());
        self.executor.run(&self.graph, &self.plan, params, &mut [], &feeds, batch, &step);
        self.executor.value(self.outputs.logits)
    }

    /// The same on one of several ranks, all of which call it.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    pub fn run_rank(&mut self, rank: Rank<'_, f32>, batch: &PackedBatch) -> Result<&[f32]> {
        let (feeds, step) = (Default::default(), StepState::default());
        self.executor.run_rank(&self.graph, &self.plan, rank, &feeds, batch, &step)?;
        Ok(self.executor.value(self.outputs.logits))
    }

    /// Tokens `[T, D]` of the last run.
    ///
    /// # Panics
    /// If the model was recorded without [`Keep::Features`].
    pub fn tokens(&self) -> &[f32] {
        self.executor.value(self.outputs.tokens)
    }

    /// Pooled vectors `[N, D]` of the last run; panics as [`Model::tokens`] does.
    pub fn features(&self) -> &[f32] {
        self.executor.value(self.outputs.features)
    }
}

/// A [`Model`] with weights of its own or borrowed ones, in the order of its parameters.
pub struct WithParams<M, P> {
    /// The model.
    pub model: M,
    /// The weights.
    pub params: P,
}

impl<M: BorrowMut<Model>, P: AsRef<[Vec<f32>]>> Forward for WithParams<M, P> {
    fn classes(&self) -> usize {
        self.model.borrow().classes()
    }

    fn flops(&self, work: &Workload) -> f64 {
        self.model.borrow().flops(work)
    }

    fn logits(&mut self, batch: &PackedBatch) -> Result<&[f32]> {
        Ok(self.model.borrow_mut().run(self.params.as_ref(), batch))
    }
}

impl<M: BorrowMut<Model>, P: AsRef<[Vec<f32>]>> Features for WithParams<M, P> {
    /// # Panics
    /// If the model was recorded without [`Keep::Features`].
    fn pooled(&mut self, batch: &PackedBatch) -> Result<Vec<f32>> {
        let model = self.model.borrow_mut();
        model.run(self.params.as_ref(), batch);
        Ok(model.features().to_vec())
    }

    fn observed(&self) -> Result<&dyn Observed> {
        Ok(self)
    }
}

impl<M: BorrowMut<Model>, P: AsRef<[Vec<f32>]>> Observed for WithParams<M, P> {
    fn graph(&self) -> &Graph {
        self.model.borrow().graph()
    }

    fn value(&self, tensor: Tensor) -> Result<Cow<'_, [f32]>> {
        let model = self.model.borrow();
        Ok(Cow::Borrowed(match model.graph.info(tensor).kind {
            Kind::Parameter(p) => &self.params.as_ref()[p],
            _ => model.executor.value(tensor),
        }))
    }
}
