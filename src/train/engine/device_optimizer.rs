//! The optimiser of a training on a device: its state in arenas of the parameters' layout, and what it is told of
//! each batch.

use std::ops::Range;
use std::rc::Rc;

use bytemuck::Pod;
use half::bf16;

use crate::autograd::ParamSpec;
use crate::cpu::optim::adafactor::Factoring;
use crate::device::{Buffer, Device, Pinned, Stream};
use crate::error::Result;
use crate::kernels::optim::{
    self, Arena, Lines, Moments, Operands, OptimizerState, OptimizerStep, Squared, StatisticTables,
    Statistics, Tables, WholeSpec,
};
use crate::parallel::DeviceGroup;
use crate::recipe::{OptimizerKind, TrainConfig};

/// An optimiser over arenas of one layout: those of a whole model, or of a rank's pieces of one.
pub(super) struct DeviceOptimizer {
    kind: OptimizerKind,
    arena: Arena,
    tables: Tables,
    kept: Kept,
    squared: Option<Squared>,
    squares: Option<Squares>,
    state: Buffer<OptimizerState>,
    workspace: Buffer<u8>,
    /// What is told, one for each batch that may be under way.
    steps: Vec<(Buffer<OptimizerStep>, Pinned<OptimizerStep>)>,
    settings: OptimizerStep,
}

/// What it keeps of the gradients.
enum Kept {
    Momentum { m: Buffer<f32>, nesterov: bool },
    Adam { m: Buffer<f32>, v: Buffer<f32> },
    Factored { m: Buffer<bf16>, v: Buffer<f32>, statistics: Statistics, tables: Box<StatisticTables> },
}

impl Kept {
    /// Zeros.
    fn new(
        device: &Device,
        arena: &Arena,
        lines: impl FnOnce() -> (Vec<WholeSpec>, Vec<Lines>),
        config: &TrainConfig,
    ) -> Result<Self> {
        let arena_of_zeros = || device.zeros::<f32>(arena.len());
        match config.optimizer {
            OptimizerKind::Sgd => Ok(Self::Momentum { m: arena_of_zeros()?, nesterov: config.nesterov }),
            OptimizerKind::AdamW | OptimizerKind::Lamb => {
                Ok(Self::Adam { m: arena_of_zeros()?, v: arena_of_zeros()? })
            }
            OptimizerKind::Adafactor => {
                let (wholes, lines) = lines();
                let statistics = Statistics::new(arena, &lines, &wholes)?;
                let (m, v) = (device.zeros(arena.len())?, device.zeros(statistics.len())?);
                Ok(Self::Factored { m, v, tables: Box::new(statistics.upload(device)?), statistics })
            }
        }
    }

    fn operands(&self) -> Moments<'_> {
        match self {
            Self::Momentum { m, nesterov } => Moments::Momentum { m, nesterov: *nesterov },
            Self::Adam { m, v } => Moments::Adam { m, v },
            Self::Factored { m, v, statistics, tables } => Moments::Factored { m, v, statistics, tables },
        }
    }
}

/// Elements of an arena in f32 or bf16.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    Single(&'a Buffer<f32>),
    Half(&'a Buffer<bf16>),
}

impl Values<'_> {
    /// Replaces elements.
    pub(super) fn write(self, stream: &Stream, range: Range<usize>, values: &[f32]) -> Result<()> {
        match self {
            Self::Single(arena) => part(arena, range)?.write(stream, values),
            Self::Half(arena) => {
                let values: Vec<bf16> = values.iter().copied().map(bf16::from_f32).collect();
                part(arena, range)?.write(stream, &values)
            }
        }
    }

    /// Elements, once everything queued has run.
    pub(super) fn read(self, range: Range<usize>) -> Result<Vec<f32>> {
        match self {
            Self::Single(arena) => part(arena, range)?.download(),
            Self::Half(arena) => Ok(part(arena, range)?.download()?.into_iter().map(bf16::to_f32).collect()),
        }
    }
}

/// Elements of an arena.
fn part<T: Pod>(arena: &Buffer<T>, range: Range<usize>) -> Result<Buffer<T>> {
    arena.view(range.start * size_of::<T>()..range.end * size_of::<T>())
}

/// Where an arena's values are.
pub(super) struct Arenas<'a> {
    /// Parameters.
    pub master: &'a Buffer<f32>,
    /// The same in bf16.
    pub weights: &'a Buffer<bf16>,
    /// Gradients.
    pub grads: &'a Buffer<f32>,
    /// Moving average of the parameters.
    pub average: Option<&'a Buffer<f32>>,
}

/// Sums of squares of all ranks.
pub(super) struct Squares {
    /// The ranks; none where memory is only counted.
    group: Option<Rc<DeviceGroup>>,
    /// How many elements this rank counts, from the first.
    counted: usize,
    /// Of the gradients, for their norm.
    gradients: Sums,
    /// LAMB: of each parameter and its update.
    tensors: Option<Sums>,
}

/// This rank's sums and those of all.
struct Sums {
    own: Buffer<f64>,
    all: Buffer<f64>,
}

impl Sums {
    fn new(device: &Device, size: usize, len: usize) -> Result<Self> {
        Ok(Self { own: device.zeros(len)?, all: device.zeros(size * len)? })
    }

    fn gather(&self, group: Option<&DeviceGroup>, stream: &Stream) -> Result<()> {
        group.map_or(Ok(()), |group| group.all_gather(stream, &self.all, &self.own))
    }
}

impl Squares {
    /// For `size` ranks, of which this one counts the first `counted` elements of `arena`.
    pub(super) fn new(
        device: &Device,
        group: Option<Rc<DeviceGroup>>,
        size: usize,
        (arena, counted): (&Arena, usize),
        kind: OptimizerKind,
    ) -> Result<Self> {
        // However many gradients they count, all ranks have as many sums.
        let blocks = optim::norm_blocks(device.info().multiprocessors, arena.len());
        let tensors = match kind {
            OptimizerKind::AdamW | OptimizerKind::Sgd | OptimizerKind::Adafactor => None,
            OptimizerKind::Lamb => Some(Sums::new(device, size, 2 * arena.wholes())?),
        };
        Ok(Self { gradients: Sums::new(device, size, blocks)?, tensors, group, counted })
    }
}

/// What comes after the last batch of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    pub lr: f64,
    /// Sum of the loss weights of its images.
    pub images: f64,
}

impl DeviceOptimizer {
    /// Zeros. `squared` tells of gradients whose squares come with them; with `squares` the norm is that of all ranks.
    /// `lines` tells what Adafactor sums.
    pub(super) fn new(
        device: &Device,
        arena: &Arena,
        lines: impl FnOnce() -> (Vec<WholeSpec>, Vec<Lines>),
        (squared, squares): (Option<Squared>, Option<Squares>),
        config: &TrainConfig,
        batches: usize,
    ) -> Result<Self> {
        let step = |_| Ok((device.zeros(1)?, device.pinned(1)?));
        Ok(Self {
            kind: config.optimizer,
            arena: arena.clone(),
            tables: arena.upload(device)?,
            kept: Kept::new(device, arena, lines, config)?,
            squared,
            squares,
            state: device.zeros(1)?,
            workspace: device.alloc(optim::workspace_bytes(arena, device))?,
            steps: (0..batches).map(step).collect::<Result<_>>()?,
            settings: OptimizerStep {
                lr: 0.0,
                beta1: config.beta1,
                beta2: config.beta2,
                beta2_power: config.beta2_power,
                eps: config.eps,
                clip: config.clip,
                ema_decay: config.ema,
                images: 0.0,
                seed: config.seed,
                continues: 0,
                unfinished: 0,
            },
        })
    }

    /// Bytes of everything that grows with the model.
    pub(super) fn bytes(&self) -> usize {
        match &self.kept {
            Kept::Momentum { m, .. } => m.bytes(),
            Kept::Adam { m, v } => m.bytes() + v.bytes(),
            Kept::Factored { m, v, .. } => m.bytes() + v.bytes(),
        }
    }

    /// Bytes of the gradients that it reads for their norm, sums of squares included, before it reads all for the update.
    pub(super) fn norm_bytes(&self) -> usize {
        self.squared.as_ref().map_or(self.arena.len() * size_of::<f32>(), Squared::bytes)
    }

    /// First moments.
    pub(super) fn first(&self) -> Values<'_> {
        match &self.kept {
            Kept::Momentum { m, .. } | Kept::Adam { m, .. } => Values::Single(m),
            Kept::Factored { m, .. } => Values::Half(m),
        }
    }

    /// Second moments, where every element has one.
    pub(super) fn second(&self) -> Option<Values<'_>> {
        match &self.kept {
            Kept::Adam { v, .. } => Some(Values::Single(v)),
            Kept::Momentum { .. } | Kept::Factored { .. } => None,
        }
    }

    /// How many numbers are kept of the second moments of each whole parameter; nothing by others than Adafactor.
    pub(super) fn statistic_lens(&self, params: &[ParamSpec]) -> Vec<usize> {
        self.kind.factorings(params).into_iter().map(Factoring::len).collect()
    }

    /// What is kept of the second moments of each whole parameter.
    pub(super) fn statistics(&self, params: &[ParamSpec]) -> Result<Vec<Vec<f32>>> {
        let Kept::Factored { v, .. } = &self.kept else { return Ok(Vec::new()) };
        let (all, lens) = (v.download()?, self.statistic_lens(params));
        let mut rest = &all[..];
        let next = |&len: &usize| {
            let (own, others) = rest.split_at(len);
            rest = others;
            own.to_vec()
        };
        Ok(lens.iter().map(next).collect())
    }

    /// Replaces them.
    pub(super) fn write_statistics(&self, stream: &Stream, statistics: &[Vec<f32>]) -> Result<()> {
        let Kept::Factored { v, .. } = &self.kept else { return Ok(()) };
        let mut all = statistics.concat();
        all.resize(v.len(), 0.0);
        v.write(stream, &all)
    }

    pub(super) fn state(&self) -> &Buffer<OptimizerState> {
        &self.state
    }

    /// Queues what batch `at` is told: whether it is the `first` of its step, and what its last is followed by.
    pub(super) fn write(
        &mut self,
        at: usize,
        stream: &Stream,
        first: bool,
        update: Option<Update>,
    ) -> Result<()> {
        let (buffer, host) = &mut self.steps[at];
        let [continues, unfinished] = [!first, update.is_none()].map(i32::from);
        let Update { lr, images } = update.unwrap_or(Update { lr: 0.0, images: 0.0 });
        host.edit()?[0] = OptimizerStep { lr, images, continues, unfinished, ..self.settings };
        buffer.write_pinned(stream, host)
    }

    /// Queues what comes before batch `at`: zero gradients, where it is the first of its step.
    pub(super) fn before(&self, at: usize, stream: &Stream, grads: &Buffer<f32>) -> Result<()> {
        optim::zero(stream, grads, Some(&self.steps[at].0))
    }

    /// Queues what comes after batch `at`: the update, where it is the last of its step.
    pub(super) fn after(&self, at: usize, stream: &Stream, arenas: &Arenas<'_>) -> Result<()> {
        let operands = Operands {
            arena: &self.arena,
            tables: &self.tables,
            params: arenas.master,
            grads: arenas.grads,
            squared: self.squared.as_ref(),
            moments: self.kept.operands(),
            weights: Some(arenas.weights),
            average: arenas.average,
            step: &self.steps[at].0,
            state: &self.state,
            stochastic: false,
            workspace: &self.workspace,
        };
        let Some(Squares { group, counted, gradients, tensors }) = &self.squares else {
            return match self.kind {
                OptimizerKind::AdamW => operands.adamw(stream),
                OptimizerKind::Lamb => operands.lamb(stream),
                OptimizerKind::Sgd => operands.sgd(stream),
                OptimizerKind::Adafactor => operands.adafactor(stream),
            };
        };
        operands.squares(stream, 0..*counted, &gradients.own)?;
        gradients.gather(group.as_deref(), stream)?;
        match (&self.kept, tensors) {
            (Kept::Momentum { .. }, _) => operands.sgd_of(stream, &gradients.all),
            (Kept::Factored { tables, .. }, _) => {
                operands.adafactor_sums(stream, &gradients.all, *counted)?;
                if let Some(group) = group {
                    group.all_reduce(stream, &tables.sums)?;
                }
                operands.adafactor_of(stream)
            }
            (Kept::Adam { .. }, None) => operands.adamw_of(stream, &gradients.all),
            (Kept::Adam { .. }, Some(tensors)) => {
                operands.lamb_squares(stream, &gradients.all, *counted, &tensors.own)?;
                tensors.gather(group.as_deref(), stream)?;
                operands.lamb_of(stream, &tensors.all)
            }
        }
    }

    /// Replaces the count of steps.
    pub(super) fn write_step(&self, stream: &Stream, step: u64) -> Result<()> {
        self.state.write(stream, &[OptimizerState { step, ..Default::default() }])
    }
}
