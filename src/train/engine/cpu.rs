//! The CPU device: f32, and a step has run when it was queued.
//!
//! On several ranks the data axis shares out parameters, gradients and optimiser state ([`zero`]), the tensor axis
//! the layers; a rank holds its slices of its part of each parameter. One rank has one slice of each: all of it.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;

use super::slices::{Slices, sum_outcome};
use super::{Average, Engine, StateKind, StateParts, StateSource, other_model};
use crate::autograd::exec::WholeStore;
use crate::autograd::{CpuExecutor, ParamSpec, Rank, Shard, Split, StepState, Workload};
use crate::cpu::contrastive::retrieved;
use crate::cpu::optim::moving_average;
use crate::data::batch::{PackedBatch, Patches};
use crate::error::{Error, Result};
use crate::eval::metrics::Classification;
use crate::eval::model::{Forward, Model};
use crate::eval::run::labels;
use crate::eval::towers::{CpuTowers, Embed};
use crate::models::two_tower::Towers;
use crate::parallel::MeshGroups;
use crate::parallel::zero::{Channels, PiecedStore, Schedule, Slice};
use crate::recipe::Recipe;
use crate::train::optimizer::{Optimizer, Sums};
use crate::train::step::{Objective, StepOutcome, TrainStep, one_rank};

/// A training on the CPU device.
pub struct CpuEngine {
    step: TrainStep,
    executor: CpuExecutor<f32>,
    slices: Slices,
    /// What sharing parameters out over the data axis takes; nothing on an axis of one.
    data: Option<DataAxis>,
    params: Vec<Vec<f32>>,
    grads: Vec<Vec<f32>>,
    ema: Option<Vec<Vec<f32>>>,
    ema_decay: f64,
    optimizer: Optimizer,
    evaluated: Evaluation,
    seed: u64,
    /// Batches of the step that is being queued, but for its last.
    added: Vec<PackedBatch>,
    finished: VecDeque<StepOutcome>,
}

/// What an evaluation runs.
enum Evaluation {
    /// A model of classes.
    Classes(Box<Model>),
    /// One of images and texts.
    Towers(Box<CpuTowers>),
}

/// When and how the data axis gathers and sums.
struct DataAxis {
    channels: Channels,
    schedule: Schedule,
    /// Of an evaluation.
    forward: Schedule,
}

/// A step of which is known when its parts began and ended.
#[derive(Clone, Debug)]
pub struct TimedStep {
    /// The step: gradients from zeros, the plan's nodes, and the optimiser after them.
    pub step: [Instant; 2],
    /// Each node, in the order of the plan.
    pub nodes: Vec<[Instant; 2]>,
    /// What it did.
    pub outcome: StepOutcome,
}

impl CpuEngine {
    /// This rank's part of the training of `recipe` from `state`, of which it takes its slices.
    ///
    /// # Errors
    /// If the model's shape is invalid, or `step` is not of this rank's part of it.
    pub fn new(
        recipe: &Recipe,
        step: TrainStep,
        slots: usize,
        state: &dyn StateSource,
        ranks: Rc<MeshGroups>,
    ) -> Result<Self> {
        let shard = Shard { rank: ranks.tensor.rank(), size: ranks.tensor.size() };
        if step.graph().shard() != shard {
            return Err(Error::failure(format!(
                "the step is of {:?} of a tensor axis, and this rank is {shard:?}",
                step.graph().shard()
            )));
        }
        let tokens = recipe.packing.tokens;
        let evaluated = match step.objective() {
            Objective::Pairs(_) => Evaluation::Towers(Box::new(CpuTowers::new(recipe, tokens, slots)?)),
            Objective::Classes { .. } => Evaluation::Classes(Box::new(Model::of_shard(
                recipe,
                step.classes(),
                [tokens, slots],
                shard,
            )?)),
        };
        let slices = Slices::new(step.graph(), ranks);
        let data = match (slices.ranks().data.size(), &evaluated) {
            (1, _) => None,
            (_, Evaluation::Towers(_)) => return Err(one_rank(recipe)),
            (_, Evaluation::Classes(evaluated)) => Some(DataAxis {
                channels: Channels::new(&slices.ranks().data)?,
                schedule: Schedule::new(step.graph(), step.plan(), slices.units()),
                forward: Schedule::new(evaluated.graph(), evaluated.plan(), slices.units()),
            }),
        };
        let graph = step.graph();
        let mut optimizer = Optimizer::sliced(step.params(), slices.own(graph), &recipe.train);
        let read = |kind| slices.read(graph, state, kind);
        let second = if optimizer.keeps_second() { read(StateKind::Second)? } else { Vec::new() };
        let lens: Vec<usize> = optimizer.statistics().iter().map(Vec::len).collect();
        let statistics = if lens.is_empty() { Vec::new() } else { state.statistics(&lens)? };
        optimizer.set_moments(read(StateKind::First)?, second, statistics);
        optimizer.step = state.optimizer_step();
        let params = read(StateKind::Weights)?;
        let ema = match state.average() {
            Average::None => None,
            Average::Weights => Some(params.clone()),
            Average::Own => Some(read(StateKind::Average)?),
        };
        Ok(Self {
            evaluated,
            executor: CpuExecutor::with_products(recipe.train.matmul),
            params,
            grads: Vec::new(),
            ema,
            ema_decay: recipe.train.ema,
            optimizer,
            seed: recipe.train.seed,
            added: Vec::new(),
            finished: VecDeque::new(),
            slices,
            data,
            step,
        })
    }

    /// This rank's slices of the gradients of the last step, in the order of the parameters.
    pub fn grads(&self) -> &[Vec<f32>] {
        &self.grads
    }

    /// A step over one batch, with what it and each node of its plan took.
    ///
    /// # Errors
    /// Those of [`Engine::queue`].
    pub fn timed(&mut self, batch: &PackedBatch, lr: f64) -> Result<TimedStep> {
        self.executor.record_times();
        let begun = Instant::now();
        self.add(batch, Some(lr))?;
        let ended = Instant::now();
        let nodes = self.executor.take_times();
        Ok(TimedStep { step: [begun, ended], nodes, outcome: self.collect()? })
    }

    /// What is computed.
    pub fn step(&self) -> &TrainStep {
        &self.step
    }

    /// Bytes that this rank has sent for weights and gradients of the data axis.
    pub fn data_axis_sent(&self) -> u64 {
        self.data.as_ref().map_or(0, |data| data.channels.sent())
    }

    /// Runs forward and backward over `batches`, whose gradients are summed with those of the other ranks', and
    /// updates nothing.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    pub fn gradients(&mut self, batches: &[PackedBatch]) -> Result<StepOutcome> {
        if self.grads.is_empty() {
            self.grads = self.params.iter().map(|p| vec![0.0; p.len()]).collect();
        }
        for grad in &mut self.grads {
            grad.fill(0.0);
        }
        let Self { step, executor, params, grads, slices, data, .. } = self;
        let ranks = slices.ranks();
        let weights = batches.iter().flat_map(|b| &b.weights).map(|w| f64::from(*w)).sum::<f64>();
        let mut total = [weights];
        ranks.data.all_reduce(&mut total)?;
        let state = StepState { seed: self.seed, loss_scale: 1.0 / total[0].max(1.0) };
        let mut outcome = StepOutcome::default();
        let mut counts = Classification::new(step.classes(), step.loss_kind());
        let mut pairs = Vec::new();
        for batch in batches {
            let feeds = Default::default();
            let (graph, plan) = (step.graph(), step.plan());
            let tensor = Some(&ranks.tensor);
            match data {
                None => {
                    let rank = Rank { store: &mut WholeStore { params, grads }, tensor };
                    executor.run_rank(graph, plan, rank, &feeds, batch, &state)?;
                }
                Some(DataAxis { channels, schedule, .. }) => {
                    let mut store = PiecedStore::new(channels, slices.units(), schedule, params, grads);
                    let rank = Rank { store: &mut store, tensor };
                    executor.run_rank(graph, plan, rank, &feeds, batch, &state)?;
                    store.finish()?;
                }
            }
            let per_image = executor.value(step.per_image());
            outcome.loss += per_image.iter().map(|l| f64::from(*l)).sum::<f64>() * state.loss_scale;
            match step.objective() {
                Objective::Classes { logits } => {
                    counts.add(executor.value(logits), &labels(batch), &batch.weights);
                }
                Objective::Pairs(Towers { images, texts, .. }) => {
                    let width = step.graph().info(images).cols;
                    let vectors = [images, texts].map(|tensor| executor.value(tensor));
                    pairs.extend(retrieved(vectors[0], vectors[1], &batch.weights, width));
                }
            }
            outcome.tokens += batch.live_tokens();
            outcome.budget += batch.tokens();
            outcome.flops += step.flops(&Workload::of(batch));
        }
        slices.sum_partial(step.graph(), grads)?;
        let report = counts.report();
        (outcome.accuracy, outcome.images) = match step.objective() {
            Objective::Classes { .. } => (report.top1, report.images),
            Objective::Pairs(_) => {
                let counted = pairs.iter().filter(|ahead| **ahead >= 0).count();
                let found = pairs.iter().filter(|ahead| **ahead == 0).count();
                (found as f64 / counted.max(1) as f64, counted as u64)
            }
        };
        sum_outcome(&ranks.data, outcome)
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
        if matches!(batch.patches, Patches::Pictures(_)) {
            return Err(Error::failure("the batch holds pictures; on the CPU set data.views = \"host\""));
        }
        let Some(lr) = last else {
            self.added.push(batch.clone());
            return Ok(());
        };
        let mut outcome = if self.added.is_empty() {
            self.gradients(std::slice::from_ref(batch))?
        } else {
            let mut batches = std::mem::take(&mut self.added);
            batches.push(batch.clone());
            self.gradients(&batches)?
        };
        outcome.grad_norm = f64::NAN;
        if outcome.loss.is_finite() {
            let Self { slices, step, optimizer, params, grads, .. } = self;
            outcome.grad_norm = slices.norm(step.graph(), grads)?;
            if outcome.grad_norm.is_finite() {
                let sum = |sums: Sums<'_>| slices.sum(sums);
                optimizer.step_of_slices(lr, outcome.grad_norm, params, grads, sum)?;
            }
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

    fn parts(&mut self) -> Result<&dyn StateParts> {
        Ok(self)
    }

    fn model(&mut self) -> Result<Box<dyn Forward + '_>> {
        let Self { evaluated: Evaluation::Classes(model), slices, data, params, ema, .. } = self else {
            return Err(other_model());
        };
        let params = ema.as_ref().unwrap_or(params);
        Ok(Box::new(Evaluated { model, slices, data: data.as_ref(), params }))
    }

    fn towers(&mut self) -> Result<Box<dyn Embed + '_>> {
        match &mut self.evaluated {
            Evaluation::Towers(towers) => {
                Ok(Box::new(towers.with_params(self.ema.as_ref().unwrap_or(&self.params))))
            }
            Evaluation::Classes(_) => Err(other_model()),
        }
    }
}

impl StateParts for CpuEngine {
    fn ranks(&self) -> &MeshGroups {
        self.slices.ranks()
    }

    fn params(&self) -> &[ParamSpec] {
        self.step.params()
    }

    fn split(&self, param: usize) -> Split {
        self.step.graph().split(param)
    }

    fn optimizer_step(&self) -> Result<u64> {
        Ok(self.optimizer.step)
    }

    fn keeps_average(&self) -> bool {
        self.ema.is_some()
    }

    fn keeps_second(&self) -> bool {
        self.optimizer.keeps_second()
    }

    fn statistics(&self) -> Result<Vec<Vec<f32>>> {
        Ok(self.optimizer.statistics().to_vec())
    }

    fn units(&self) -> Vec<Range<usize>> {
        self.slices.units().units().iter().map(|unit| unit.params.clone()).collect()
    }

    fn slices_of(&self, unit: usize, data: usize) -> Vec<Slice> {
        self.slices.units().slices_of(unit, data)
    }

    fn read(
        &self,
        kind: StateKind,
        unit: usize,
        take: &mut dyn FnMut(&Slice, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let tensor = |i: usize| -> Cow<'_, [f32]> {
            match kind {
                StateKind::Weights => self.params[i].as_slice().into(),
                StateKind::Average => self.ema.as_ref().unwrap_or(&self.params)[i].as_slice().into(),
                StateKind::First => self.optimizer.first(i),
                StateKind::Second => self.optimizer.second(i).into(),
            }
        };
        let units = self.slices.units();
        units.slices_in(unit).try_for_each(|i| take(&units.slices()[i], &tensor(i)))
    }
}

/// The model as all ranks run it together.
struct Evaluated<'a> {
    model: &'a mut Model,
    slices: &'a Slices,
    data: Option<&'a DataAxis>,
    params: &'a [Vec<f32>],
}

impl Forward for Evaluated<'_> {
    fn classes(&self) -> usize {
        self.model.classes()
    }

    fn flops(&self, work: &Workload) -> f64 {
        self.model.flops(work)
    }

    fn logits(&mut self, batch: &PackedBatch) -> Result<&[f32]> {
        let (params, tensor) = (self.params, Some(&self.slices.ranks().tensor));
        match self.data {
            None => {
                let store = &mut WholeStore { params, grads: &mut [] };
                self.model.run_rank(Rank { store, tensor }, batch)
            }
            Some(DataAxis { channels, forward, .. }) => {
                let units = self.slices.units();
                let store = &mut PiecedStore::new(channels, units, forward, params, &mut []);
                self.model.run_rank(Rank { store, tensor }, batch)
            }
        }
    }
}
