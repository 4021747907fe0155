//! The CPU device: f32, and a step has run when it was queued.

use std::collections::VecDeque;
use std::rc::Rc;

use super::{Engine, TrainState, loss_weight};
use crate::autograd::{CpuExecutor, ParamSpec, StepState, Workload};
use crate::cpu::optim::moving_average;
use crate::data::batch::PackedBatch;
use crate::error::{Error, Result};
use crate::eval::metrics::Classification;
use crate::eval::model::{Forward, Model, WithParams};
use crate::eval::run::labels;
use crate::parallel::MeshGroups;
use crate::recipe::Recipe;
use crate::train::optimizer::Optimizer;
use crate::train::step::{StepOutcome, TrainStep};

/// A training on the CPU device.
pub struct CpuEngine {
    step: TrainStep,
    executor: CpuExecutor<f32>,
    params: Vec<Vec<f32>>,
    grads: Vec<Vec<f32>>,
    ema: Option<Vec<Vec<f32>>>,
    ema_decay: f64,
    optimizer: Optimizer,
    evaluated: Model,
    seed: u64,
    /// Batches of the step that is being queued, but for its last.
    added: Vec<PackedBatch>,
    finished: VecDeque<StepOutcome>,
    ranks: Rc<MeshGroups>,
}

impl CpuEngine {
    /// The training of `recipe` from `state`, on this rank of `ranks`.
    ///
    /// # Errors
    /// If the model's shape is invalid.
    pub fn new(
        recipe: &Recipe,
        step: TrainStep,
        slots: usize,
        state: TrainState<'static>,
        ranks: Rc<MeshGroups>,
    ) -> Result<Self> {
        let mut optimizer = Optimizer::new(step.params(), &recipe.train);
        (optimizer.m, optimizer.v) = (state.m.into_owned(), state.v.into_owned());
        optimizer.step = state.optimizer_step;
        Ok(Self {
            evaluated: Model::new(recipe, step.classes(), recipe.packing.tokens, slots, false)?,
            executor: CpuExecutor::new(),
            params: state.weights.into_owned(),
            grads: Vec::new(),
            ema: state.ema.map(|ema| ema.into_owned()),
            ema_decay: recipe.train.ema,
            optimizer,
            seed: recipe.train.seed,
            added: Vec::new(),
            finished: VecDeque::new(),
            step,
            ranks,
        })
    }

    /// Gradients of the last step, in the order of the parameters.
    pub fn grads(&self) -> &[Vec<f32>] {
        &self.grads
    }

    /// Runs forward and backward over `batches`, whose gradients are summed, and updates nothing.
    pub fn gradients(&mut self, batches: &[PackedBatch]) -> StepOutcome {
        if self.grads.is_empty() {
            self.grads = self.params.iter().map(|p| vec![0.0; p.len()]).collect();
        }
        for grad in &mut self.grads {
            grad.fill(0.0);
        }
        let Self { step, executor, params, grads, .. } = self;
        let state = StepState { seed: self.seed, loss_scale: 1.0 / loss_weight(batches) };
        let mut outcome = StepOutcome::default();
        let mut counts = Classification::new(step.classes(), step.loss_kind());
        for batch in batches {
            let feeds = Default::default();
            executor.run(step.graph(), step.plan(), params, grads, &feeds, batch, &state);
            let per_image = executor.value(step.per_image());
            outcome.loss += per_image.iter().map(|l| f64::from(*l)).sum::<f64>() * state.loss_scale;
            counts.add(executor.value(step.logits()), &labels(batch), &batch.weights);
            outcome.tokens += batch.live_tokens();
            outcome.budget += batch.tokens();
            outcome.flops += step.flops(&Workload::of(batch));
        }
        let report = counts.report();
        (outcome.accuracy, outcome.images) = (report.top1, report.images);
        outcome
    }

    /// Sums gradients and outcome over the data ranks.
    fn reduce(&mut self, batches: &[PackedBatch], outcome: &mut StepOutcome) -> Result<()> {
        let ranks = &self.ranks;
        if ranks.is_alone() {
            return Ok(());
        }
        let own = loss_weight(batches);
        let mut sums = [
            batches.iter().flat_map(|b| &b.weights).map(|w| f64::from(*w)).sum(),
            outcome.loss * own,
            outcome.accuracy * outcome.images as f64,
            outcome.images as f64,
            outcome.tokens as f64,
            outcome.budget as f64,
            outcome.flops,
        ];
        ranks.sum_over_data(&mut sums)?;
        let [weight, loss, correct, images, tokens, budget, flops] = sums;
        let weight = weight.max(1.0);
        let share = (own / weight) as f32;
        for grad in &mut self.grads {
            grad.iter_mut().for_each(|g| *g *= share);
            ranks.data.all_reduce(grad)?;
        }
        (outcome.loss, outcome.accuracy) = (loss / weight, correct / images.max(1.0));
        (outcome.images, outcome.flops) = (images as u64, flops);
        (outcome.tokens, outcome.budget) = (tokens as usize, budget as usize);
        Ok(())
    }
}

impl Engine for CpuEngine {
    fn params(&self) -> &[ParamSpec] {
        self.step.params()
    }

    fn depth(&self) -> usize {
        1
    }

    fn add(&mut self, batch: &PackedBatch, last: Option<f64>) -> Result<()> {
        let Some(lr) = last else {
            self.added.push(batch.clone());
            return Ok(());
        };
        let mut batches = std::mem::take(&mut self.added);
        batches.push(batch.clone());
        let mut outcome = self.gradients(&batches);
        self.reduce(&batches, &mut outcome)?;
        outcome.grad_norm = f64::NAN;
        if outcome.loss.is_finite() {
            outcome.grad_norm = match self.optimizer.step(lr, &mut self.params, &self.grads) {
                Ok(norm) => norm,
                Err(not_finite) => not_finite.norm,
            };
        }
        if let Some(ema) = &mut self.ema
            && outcome.grad_norm.is_finite()
        {
            ema.iter_mut().zip(&self.params).for_each(|(e, p)| moving_average(e, p, self.ema_decay));
        }
        self.finished.push_back(outcome);
        Ok(())
    }

    fn is_ready(&self) -> bool {
        !self.finished.is_empty()
    }

    fn collect(&mut self) -> Result<StepOutcome> {
        self.finished.pop_front().ok_or_else(|| Error::failure("no step is queued that could be collected"))
    }

    fn state(&mut self) -> Result<TrainState<'_>> {
        Ok(TrainState {
            weights: self.params.as_slice().into(),
            ema: self.ema.as_deref().map(Into::into),
            m: self.optimizer.m.as_slice().into(),
            v: self.optimizer.v.as_slice().into(),
            optimizer_step: self.optimizer.step,
        })
    }

    fn model(&mut self) -> Result<Box<dyn Forward + '_>> {
        let params = self.ema.as_ref().unwrap_or(&self.params);
        Ok(Box::new(WithParams { model: &mut self.evaluated, params }))
    }
}
