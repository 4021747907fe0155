//! The optimiser of a training on a device: its state in arenas of the parameters' layout, and what it is told of
//! each batch.

use std::sync::Arc;

use crate::autograd::DeviceExecutor;
use crate::autograd::device::DeviceParams;
use crate::device::{Buffer, Device, Pinned, Stream};
use crate::error::{Error, Result};
use crate::kernels::optim::{self, Operands, OptimizerState, OptimizerStep, Tables};
use crate::recipe::TrainConfig;

/// AdamW over the arenas of a [`DeviceExecutor`].
pub(super) struct DeviceOptimizer {
    tables: Tables,
    m: Buffer<f32>,
    v: Buffer<f32>,
    /// The moving average of the parameters.
    average: Option<Arc<DeviceParams>>,
    state: Buffer<OptimizerState>,
    workspace: Buffer<u8>,
    /// What is told, one for each batch that may be under way.
    steps: Vec<(Buffer<OptimizerStep>, Pinned<OptimizerStep>)>,
    settings: OptimizerStep,
}

/// What comes after the last batch of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    pub lr: f64,
    /// Sum of the loss weights of its images.
    pub images: f64,
}

impl DeviceOptimizer {
    /// Zeros.
    pub(super) fn new(
        device: &Device,
        params: &DeviceParams,
        config: &TrainConfig,
        batches: usize,
    ) -> Result<Self> {
        let layout = params.layout();
        let arena = layout.arena();
        let average = match config.ema > 0.0 {
            true => Some(Arc::new(DeviceParams::new(device, layout.clone())?)),
            false => None,
        };
        let step = |_| Ok((device.zeros(1)?, device.pinned(1)?));
        Ok(Self {
            tables: arena.upload(device)?,
            m: device.zeros(arena.len())?,
            v: device.zeros(arena.len())?,
            average,
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
        let average = self.average.as_ref().map_or(0, |average| average.bytes());
        size_of::<f32>() * (self.m.len() + self.v.len()) + average
    }

    pub(super) fn average(&self) -> Option<&Arc<DeviceParams>> {
        self.average.as_ref()
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
    pub(super) fn before(&self, at: usize, executor: &DeviceExecutor) -> Result<()> {
        optim::zero(executor.stream(), executor.grads(), Some(&self.steps[at].0))
    }

    /// Queues what comes after batch `at`: the update, where it is the last of its step.
    pub(super) fn after(&self, at: usize, executor: &DeviceExecutor) -> Result<()> {
        let params = executor.params();
        let operands = Operands {
            arena: params.layout().arena(),
            tables: &self.tables,
            params: params.master(),
            grads: executor.grads(),
            m: &self.m,
            v: &self.v,
            weights: Some(params.weights()),
            average: self.average.as_ref().map(|average| average.master()),
            step: &self.steps[at].0,
            state: &self.state,
            stochastic: false,
            workspace: &self.workspace,
        };
        operands.adamw(executor.stream())
    }

    /// Replaces moments, average and count of steps.
    pub(super) fn load(&mut self, executor: &DeviceExecutor, state: &super::TrainState<'_>) -> Result<()> {
        let (stream, layout) = (executor.stream(), executor.params().layout());
        self.m.write(stream, &layout.pack(&state.m)?)?;
        self.v.write(stream, &layout.pack(&state.v)?)?;
        match (&self.average, &state.ema) {
            (Some(average), Some(values)) => average.write(stream, values)?,
            (None, None) => {}
            _ => return Err(Error::failure("a state with a moving average goes with train.ema alone")),
        }
        self.state.write(stream, &[OptimizerState { step: state.optimizer_step, ..Default::default() }])
    }

    /// Moments and count of steps, once everything queued has run.
    pub(super) fn read(&self, params: &DeviceParams) -> Result<[Vec<Vec<f32>>; 2]> {
        let layout = params.layout();
        Ok([layout.unpack(&self.m.download()?), layout.unpack(&self.v.download()?)])
    }
}
