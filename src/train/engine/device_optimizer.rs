//! The optimiser of a training on a device: its state in arenas of the parameters' layout, and what it is told of
//! each batch.

use std::rc::Rc;

use half::bf16;

use crate::device::{Buffer, Device, Pinned, Stream};
use crate::error::Result;
use crate::kernels::optim::{self, Arena, Operands, OptimizerState, OptimizerStep, Tables};
use crate::parallel::DeviceGroup;
use crate::recipe::{OptimizerKind, TrainConfig};

/// AdamW or LAMB over arenas of one layout: those of a whole model, or of a rank's pieces of one.
pub(super) struct DeviceOptimizer {
    kind: OptimizerKind,
    arena: Arena,
    tables: Tables,
    m: Buffer<f32>,
    v: Buffer<f32>,
    squares: Option<Squares>,
    state: Buffer<OptimizerState>,
    workspace: Buffer<u8>,
    /// What is told, one for each batch that may be under way.
    steps: Vec<(Buffer<OptimizerStep>, Pinned<OptimizerStep>)>,
    settings: OptimizerStep,
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
            OptimizerKind::AdamW => None,
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
    /// Zeros. With `squares` the norm is that of all ranks.
    pub(super) fn new(
        device: &Device,
        arena: &Arena,
        squares: Option<Squares>,
        config: &TrainConfig,
        batches: usize,
    ) -> Result<Self> {
        let step = |_| Ok((device.zeros(1)?, device.pinned(1)?));
        Ok(Self {
            kind: config.optimizer,
            arena: arena.clone(),
            tables: arena.upload(device)?,
            m: device.zeros(arena.len())?,
            v: device.zeros(arena.len())?,
            squares,
            state: device.zeros(1)?,
            workspace: device.alloc(optim::workspace_bytes(arena, device))?,
            steps: (0..batches).map(step).collect::<Result<_>>()?,
            settings: OptimizerStep {
                lr: 0.0,
                beta1: config.beta1,
                beta2: config.beta2,
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
        size_of::<f32>() * (self.m.len() + self.v.len())
    }

    /// First and second moments.
    pub(super) fn moments(&self) -> [&Buffer<f32>; 2] {
        [&self.m, &self.v]
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
            m: &self.m,
            v: &self.v,
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
            };
        };
        operands.squares(stream, 0..*counted, &gradients.own)?;
        gradients.gather(group.as_deref(), stream)?;
        let Some(tensors) = tensors else {
            return operands.adamw_of(stream, &gradients.all);
        };
        operands.lamb_squares(stream, &gradients.all, *counted, &tensors.own)?;
        tensors.gather(group.as_deref(), stream)?;
        operands.lamb_of(stream, &tensors.all)
    }

    /// Replaces the count of steps.
    pub(super) fn write_step(&self, stream: &Stream, step: u64) -> Result<()> {
        self.state.write(stream, &[OptimizerState { step, ..Default::default() }])
    }
}
