//! One training step as it is recorded: forward, loss and backward of a packed batch.

use crate::autograd::graph::{Graph, ParamSpec, Tensor};
use crate::autograd::loss;
use crate::autograd::{Plan, Shard, Workload};
use crate::error::{Error, Result};
use crate::models::two_tower::{self, Towers};
use crate::models::vit;
use crate::recipe::{LossKind, Recipe};

/// What a step learns, and what tells how well.
#[derive(Clone, Copy, Debug)]
pub enum Objective {
    /// The classes of images: `[N, classes]`, kept.
    Classes {
        /// What the head computes.
        logits: Tensor,
    },
    /// Which text belongs to which image: the vectors `[N, D]` of both are kept.
    Pairs(Towers),
}

/// A recorded training step; an [`engine`](super::engine) runs it.
pub struct TrainStep {
    graph: Graph,
    plan: Plan,
    per_image: Tensor,
    objective: Objective,
    classes: usize,
    loss_kind: LossKind,
    /// The forward pass alone.
    forward: Graph,
    /// The same of the whole model, for model FLOPs, where the step is of a part.
    whole: Option<Graph>,
    /// The part of the forward pass that has no backward pass: a locked image tower.
    locked: Option<Graph>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Mean loss over the images with weight.
    pub loss: f64,
    /// Share of the images that were recognised, or whose text was found among all of the batch; 0 to 1.
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
        if recipe.text.is_on() {
            return Self::of_pairs(recipe, classes, slots, shard);
        }
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
        let (objective, loss_kind) = (Objective::Classes { logits: outputs.logits }, recipe.train.loss);
        let per_image = loss.per_image;
        Ok(Self { plan, per_image, objective, classes, loss_kind, forward, whole, locked: None, graph })
    }

    /// The step over images and texts, which one rank computes whole.
    fn of_pairs(recipe: &Recipe, classes: usize, slots: usize, shard: Shard) -> Result<Self> {
        if shard.is_part() {
            return Err(one_rank(recipe));
        }
        let (mut graph, tokens) = (Graph::new(), recipe.packing.tokens);
        let towers = two_tower::record(&mut graph, recipe, tokens, slots, true)?;
        let tower = || -> Result<Graph> {
            let mut tower = Graph::new();
            vit::tower(&mut tower, recipe, tokens, slots, false)?;
            Ok(tower)
        };
        let locked = recipe.contrastive.lock_image.then(tower).transpose()?;
        let forward = graph.clone();
        let loss = two_tower::learn(&mut graph, &towers, recipe);
        graph.keep(loss.per_pair);
        graph.keep(towers.images);
        graph.keep(towers.texts);
        Ok(Self {
            plan: Plan::new(&graph),
            per_image: loss.per_pair,
            objective: Objective::Pairs(towers),
            classes,
            loss_kind: recipe.train.loss,
            forward,
            whole: None,
            locked,
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

    /// `[N]`, kept: the weighted loss of each image.
    pub fn per_image(&self) -> Tensor {
        self.per_image
    }

    /// What is learned.
    pub fn objective(&self) -> Objective {
        self.objective
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// The loss.
    pub fn loss_kind(&self) -> LossKind {
        self.loss_kind
    }

    /// The forward passes alone, as an evaluation of such a batch runs them one after another: one of classes, and of pairs
    /// one of each tower.
    pub fn evaluation(&self) -> Vec<Graph> {
        let of = |kept| {
            let mut forward = self.forward.clone();
            forward.keep(kept);
            forward
        };
        match self.objective {
            Objective::Classes { logits } => vec![of(logits)],
            Objective::Pairs(towers) => vec![of(towers.images), of(towers.texts)],
        }
    }

    /// The parameters in order.
    pub fn params(&self) -> &[ParamSpec] {
        self.graph.params()
    }

    /// Model FLOPs of one step over a batch of this workload, those of all ranks of the tensor axis.
    pub fn flops(&self, work: &Workload) -> f64 {
        let forward = self.whole.as_ref().unwrap_or(&self.forward).flops(work);
        3.0 * forward - 2.0 * self.locked.as_ref().map_or(0.0, |locked| locked.flops(work))
    }
}

/// Pairs are compared with all others of their step, which one rank has alone.
pub fn one_rank(recipe: &Recipe) -> Error {
    Error::usage(format!(
        "text.tokenizer = \"{}\" compares all pairs of a step with each other, which one rank does alone: start it without \
         --ranks and --tensor",
        recipe.text.tokenizer
    ))
}
