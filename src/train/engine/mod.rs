//! What runs training steps: the weights with their gradients and optimiser, on the CPU or on a device.
//!
//! Steps are queued and collected in turn. The CPU runs a step when it is queued; a device has
//! [`depth`](Engine::depth) steps under way, so that it never waits for the host: while it is busy with one step,
//! the batch of the next is packed and copied, and what the last one did is read.

mod cpu;
mod device;
mod device_optimizer;
mod device_weights;
mod memory;
mod slices;
mod state;
mod statistics;
mod whole;

pub use cpu::{CpuEngine, TimedStep};
pub use device::{DeviceEngine, DeviceOptions, Part};
pub use device_weights::DeviceRanks;
pub(crate) use memory::usable;
pub use memory::{DeviceMemory, check_fits, largest_tokens};
pub use state::{Average, StateKind, StateParts, StateSource, Wanted, distinct, gather, read_distinct};
pub use whole::{Fresh, TrainState, Whole};

use super::step::StepOutcome;
use crate::autograd::ParamSpec;
use crate::data::batch::PackedBatch;
use crate::error::{Error, Result};
use crate::eval::model::Forward;
use crate::eval::towers::Embed;

/// Runs training steps. On several ranks all of them make the same calls, each with batches of its own.
pub trait Engine {
    /// The parameters in order.
    fn params(&self) -> &[ParamSpec];

    /// How many steps may be queued before one is collected.
    fn depth(&self) -> usize;

    /// Adds a batch to the step that is being queued: the gradients of its batches are summed, and its loss is the mean
    /// over all their images. With the last one comes the learning rate with which the optimiser then takes a step,
    /// unless the gradients are not finite.
    ///
    /// # Errors
    /// A failed device; a batch of another shape.
    fn add(&mut self, batch: &PackedBatch, last: Option<f64>) -> Result<()>;

    /// Queues a step over `batches`, of which there is at least one, with learning rate `lr`.
    ///
    /// # Errors
    /// As for [`add`](Self::add).
    fn queue(&mut self, batches: &[PackedBatch], lr: f64) -> Result<()> {
        let last = |i: usize| (i + 1 == batches.len()).then_some(lr);
        batches.iter().enumerate().try_for_each(|(i, batch)| self.add(batch, last(i)))
    }

    /// Whether a step has run that can be collected without waiting.
    fn is_ready(&self) -> bool;

    /// Waits for the oldest queued step and tells what it did, on all ranks together.
    ///
    /// # Errors
    /// No step is queued; a failed device; a label that is no class.
    fn collect(&mut self) -> Result<StepOutcome>;

    /// Everything that a checkpoint holds, as this rank holds it after all queued steps.
    ///
    /// # Errors
    /// A failed device.
    fn parts(&mut self) -> Result<&dyn StateParts>;

    /// The same in memory: whole on rank 0, nothing on others. For models that fit there.
    ///
    /// # Errors
    /// A failed device; a rank that is gone or silent.
    fn state(&mut self) -> Result<TrainState<'static>> {
        TrainState::gather(self.parts()?)
    }

    /// The model as it would be used: with the moving average of the weights where there is one. Steps that are
    /// queued come first.
    ///
    /// # Errors
    /// A failed device.
    fn model(&mut self) -> Result<Box<dyn Forward + '_>>;

    /// The same of a model of images and texts.
    ///
    /// # Errors
    /// As for [`model`](Self::model); a model of classes.
    fn towers(&mut self) -> Result<Box<dyn Embed + '_>>;
}

/// A model was asked for what it is not.
fn other_model() -> Error {
    Error::failure("a model of classes has no towers, and one of images and texts no classes of its own")
}
