//! A device: forward and backward on the kernels in bf16, parameters and optimiser in f32, all in device memory.
//!
//! Two batches have a place there. While the device works on one, the next is copied to the other on a stream of
//! its own. From the second batch on each place has its launches captured: zero gradients where a step begins,
//! forward, loss, backward, update where it ends, all one graph, whose replays read what changes from step to step
//! from device memory. Losses and ranks go back to pinned memory behind each batch, and are looked at once the
//! next one is queued.

mod parts;

mod steps;

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use super::StateSource;
use super::device_optimizer::{DeviceOptimizer, Squares};
use super::device_weights::{DeviceRanks, Weights, pieces};
use super::memory::DeviceMemory;
use super::statistics::lines;
use crate::autograd::device::{BatchShape, DeviceParams, ParamLayout, PieceLayout, fused};
use crate::autograd::{DeviceExecutor, ParamSpec, Shard};
use crate::device::{Buffer, Device, Event, Graph, Pinned, Stream};
use crate::error::{Error, Result};
use crate::eval::device::DeviceModel;
use crate::eval::towers::{self, DeviceTowers};
use crate::kernels::optim::{OptimizerState, Squared};
use crate::models::limits;
use crate::parallel::MeshGroups;
use crate::parallel::zero::Units;
use crate::recipe::Recipe;
use crate::train::optimizer::weight_decay;
use crate::train::step::{Objective, StepOutcome, TrainStep, one_rank};

/// Batches that have a place on the device.
const PLACES: usize = 2;

/// How a device runs steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Every kernel is launched by itself: slower, but what a launch refuses names its kernel.
    pub no_graph: bool,
}

/// A training on a device.
pub struct DeviceEngine {
    /// First, as their graphs must go before the ranks that they were captured with.
    places: Vec<Place>,
    step: TrainStep,
    executor: DeviceExecutor,
    weights: Weights,
    optimizer: DeviceOptimizer,
    /// The other ranks; none on one.
    ranks: Option<DeviceRanks>,
    /// Those of the host.
    host: Rc<MeshGroups>,
    /// What is gathered together.
    units: Units,
    evaluated: Evaluation,
    memory: DeviceMemory,
    /// Losses of the batch that ran last, `[N]`.
    per_image: Buffer<f32>,
    /// The stream of copies to the device.
    copies: Stream,
    options: DeviceOptions,
    seed: u64,
    /// Batches queued so far.
    queued: u64,
    /// Sum of the loss weights of the step that is being queued; none before its first batch.
    weight: Option<f64>,
    under_way: VecDeque<Batch>,
    /// The step whose batches are being collected.
    partial: Partial,
    finished: VecDeque<StepOutcome>,
    /// When the batch that was collected last had run; none where something else ran since.
    ended: Option<Arc<Event>>,
}

/// What an evaluation runs.
enum Evaluation {
    /// A model of classes.
    Classes(Box<DeviceModel>),
    /// One of images and texts.
    Towers(Box<DeviceTowers>),
}

/// A part of a step, for measuring it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Zero gradients.
    Zero,
    /// What the nodes share, see [`DeviceExecutor::launch_tables`].
    Tables,
    /// A node by its place in [`DeviceExecutor::launched`].
    Node(usize),
    /// The optimiser.
    Update,
}

/// What belongs to one of the batches in device memory.
struct Place {
    graph: Option<Graph>,
    losses: Pinned<f32>,
    rank: Pinned<i32>,
    fault: Pinned<i32>,
    state: Pinned<OptimizerState>,
    /// When the newest batch here had run.
    ended: Option<Arc<Event>>,
}

/// A batch that is queued.
struct Batch {
    place: usize,
    /// Of the last of its step, what the sum of the losses is divided by.
    images: Option<f64>,
    tokens: usize,
    budget: usize,
    flops: f64,
    begun: Event,
    ended: Arc<Event>,
}

#[derive(Default)]
struct Partial {
    outcome: StepOutcome,
    recognised: u64,
    idle: Option<f64>,
}

impl DeviceEngine {
    /// The training of `recipe`, its weights and everything else zeros until [`load`](Self::load). All device memory
    /// that it will ever use is allocated here.
    ///
    /// # Errors
    /// A model or batch that the kernels do not take; no room on the device.
    pub fn new(
        device: &Device,
        recipe: &Recipe,
        step: TrainStep,
        slots: usize,
        options: DeviceOptions,
    ) -> Result<Self> {
        Self::on_mesh(device, recipe, step, slots, options, (Shard::WHOLE, None))
    }

    /// This rank's part of a training on several ranks, of which `data` is its place on the data axis, and `step` of
    /// its place on the tensor axis. Without ranks, memory is only counted.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn on_mesh(
        device: &Device,
        recipe: &Recipe,
        step: TrainStep,
        slots: usize,
        options: DeviceOptions,
        (data, ranks): (Shard, Option<DeviceRanks>),
    ) -> Result<Self> {
        let pairs = matches!(step.objective(), Objective::Pairs(_));
        match pairs {
            true => towers::check(recipe)?,
            false => limits::check(&recipe.model)?,
        }
        let shape = BatchShape::of_training(recipe, step.classes(), slots);
        let device = &device.counted_apart();
        let decay = |param: &ParamSpec| weight_decay(param, &recipe.train);
        let (graph, keep_average) = (fused(step.graph()), recipe.train.ema > 0.0);
        let tensor = step.graph().shard();
        let whole = !data.is_part() && !tensor.is_part();
        let (weights, executor, arena, squared, squares, statistics);
        if whole {
            let layout = ParamLayout::new(&graph, &decay)?;
            arena = layout.arena().clone();
            let all = |p| layout.shape(p).iter().product();
            let all: Vec<_> = (0..graph.params().len()).map(|p| Some((p, 0..all(p)))).collect();
            statistics = (layout.clone(), all);
            let average =
                keep_average.then(|| DeviceParams::new(device, layout.clone()).map(Arc::new)).transpose()?;
            let params = Arc::new(DeviceParams::new(device, layout)?);
            executor = DeviceExecutor::with_params(device, step.graph(), shape, PLACES, params.clone())?;
            let (known, sums) = executor.squares();
            squared = match known {
                [] => None,
                _ => Some(Squared::new(device, &arena, known, sums.view(0..sums.bytes())?)?),
            };
            squares = None;
            weights = Weights::Whole { params, average };
        } else {
            let elements = DeviceExecutor::elements(device.info(), step.graph(), shape)?;
            let layout = Arc::new(PieceLayout::new(&graph, &Units::new(&graph, data), &elements, &decay)?);
            arena = layout.arena().clone();
            let counted = layout.counted(tensor.rank == 0);
            statistics = (layout.params().clone(), layout.slices().to_vec());
            weights = pieces(device, layout, keep_average)?;
            let axes = weights.axes(ranks.as_ref(), true)?;
            executor = DeviceExecutor::with_axes(device, step.graph(), shape, PLACES, axes)?;
            let world = ranks.as_ref().map(|ranks| ranks.world.clone());
            let size = data.size * tensor.size;
            let kind = recipe.train.optimizer;
            squared = None;
            squares = Some(Squares::new(device, world, size, (&arena, counted), kind)?);
        }
        let lines = || lines(&graph, &statistics.0, &statistics.1);
        let optimizer =
            DeviceOptimizer::new(device, &arena, lines, (squared, squares), &recipe.train, PLACES)?;
        let trained = device.allocated_bytes();
        let shape = BatchShape { soft_classes: None, views: None, ..shape };
        let evaluated = match &weights {
            Weights::Whole { params, average } => {
                let params = average.as_ref().unwrap_or(params).clone();
                match pairs {
                    true => {
                        let towers = DeviceTowers::beside(&executor, recipe, shape, params)?;
                        Evaluation::Towers(Box::new(towers))
                    }
                    false => {
                        let model = DeviceModel::beside(&executor, recipe, step.classes(), shape, params)?;
                        Evaluation::Classes(Box::new(model))
                    }
                }
            }
            Weights::Pieces { .. } if pairs => return Err(one_rank(recipe)),
            Weights::Pieces { .. } => {
                let axes = weights.axes(ranks.as_ref(), false)?;
                let model = DeviceModel::beside_axes(&executor, recipe, step.classes(), shape, axes, tensor)?;
                Evaluation::Classes(Box::new(model))
            }
        };
        let state = weights.bytes(&executor) + optimizer.bytes();
        let (activations, input) = (executor.layout().bytes, executor.batch_bytes());
        let [gathered, unit_gradients] = executor.gathered_bytes();
        let memory = DeviceMemory {
            state,
            moments: optimizer.bytes(),
            gathered,
            unit_gradients,
            activations,
            input,
            workspace: trained - state - gathered - unit_gradients - activations - input,
            evaluation: device.allocated_bytes() - trained,
        };
        let place = |_| {
            Ok(Place {
                graph: None,
                losses: device.pinned(slots)?,
                rank: device.pinned(slots)?,
                fault: device.pinned(1)?,
                state: device.pinned(1)?,
                ended: None,
            })
        };
        Ok(Self {
            places: (0..PLACES).map(place).collect::<Result<_>>()?,
            per_image: executor.kept_f32(step.per_image())?,
            copies: device.stream()?,
            seed: recipe.train.seed,
            queued: 0,
            weight: None,
            under_way: VecDeque::new(),
            partial: Partial::default(),
            finished: VecDeque::new(),
            ended: None,
            options,
            memory,
            evaluated,
            weights,
            optimizer,
            host: ranks.as_ref().map_or_else(|| Rc::new(MeshGroups::alone()), |ranks| ranks.host.clone()),
            ranks,
            units: Units::new(step.graph(), data),
            executor,
            step,
        })
    }

    /// Replaces weights, average, moments and count of steps.
    ///
    /// # Errors
    /// Tensors of another model; a failed device.
    pub fn load(&mut self, state: &dyn StateSource) -> Result<()> {
        self.settle()?;
        let stream = self.executor.stream();
        self.weights.load(stream, self.step.graph(), &self.units, &self.optimizer, state)
    }

    /// Device memory of the training.
    pub fn memory(&self) -> DeviceMemory {
        self.memory
    }

    /// Bytes that the optimiser reads for the norm of the gradients.
    pub fn norm_bytes(&self) -> usize {
        self.optimizer.norm_bytes()
    }

    /// What runs the step.
    pub fn executor(&self) -> &DeviceExecutor {
        &self.executor
    }

    /// Queues a part of a step by itself over the newest batch. All parts in order are a step; otherwise what is
    /// trained is of no use afterwards.
    ///
    /// # Errors
    /// No batch was queued yet; what a launch refuses; a failed device.
    pub fn launch_part(&self, part: Part) -> Result<()> {
        let Some(newest) = self.queued.checked_sub(1) else {
            return Err(Error::failure("no batch was queued over which a part of a step could run"));
        };
        let at = (newest % PLACES as u64) as usize;
        match part {
            Part::Zero => self.clear(at),
            Part::Tables => self.executor.launch_tables(at),
            Part::Node(node) => self.executor.launch_node(at, node),
            Part::Update => self.update(at),
        }
    }
}

impl Drop for DeviceEngine {
    /// Leaves the ranks in order: what is still queued would otherwise be aborted.
    fn drop(&mut self) {
        // A rank that panics is to tell the others first.
        if std::thread::panicking() {
            return;
        }
        if let Some(DeviceRanks { world, data, tensor, sums, .. }) = &self.ranks {
            for group in [world, data, tensor, sums] {
                // Where ranks have failed, that is told already.
                let _ = group.synchronize(self.executor.stream());
            }
        }
    }
}
