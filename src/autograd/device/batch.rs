//! The packed batch and the scalars of a step in device memory.

use std::ops::Deref;

use bytemuck::Pod;

use super::super::op::StepState;
use crate::data::batch::{PackedBatch, Patches, Targets};
use crate::device::{Buffer, Device, Pinned, Stream};
use crate::error::{Error, Result};

/// What all batches of a run have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShape {
    /// Token rows T.
    pub tokens: usize,
    /// Image slots N.
    pub slots: usize,
    /// Values of a patch.
    pub patch_dim: usize,
    /// Whether patches are f32 values and not u8 pixels.
    pub wide_patches: bool,
    /// Classes of soft targets; none where targets are class indices.
    pub soft_classes: Option<usize>,
    /// Most patches of an image along an axis: what position tables are resampled to.
    pub longest: usize,
}

impl BatchShape {
    /// The shape of `batch`.
    pub fn of(batch: &PackedBatch) -> Self {
        let slots = batch.slots();
        Self {
            tokens: batch.tokens(),
            slots,
            patch_dim: batch.patch_dim,
            wide_patches: matches!(batch.patches, Patches::F32(_)),
            soft_classes: match &batch.targets {
                Targets::Classes(_) => None,
                Targets::Soft(targets) => Some(targets.len() / slots.max(1)),
            },
            longest: longest(batch).max(1),
        }
    }
}

fn longest(batch: &PackedBatch) -> usize {
    batch.grids.iter().flatten().copied().max().map_or(0, usize::from)
}

/// Device memory with pinned host memory to fill it from, so that the copy runs beside everything else.
pub struct Staged<T: Pod> {
    buffer: Buffer<T>,
    host: Pinned<T>,
}

impl<T: Pod> Staged<T> {
    fn new(device: &Device, len: usize) -> Result<Self> {
        Ok(Self { buffer: device.zeros(len)?, host: device.pinned(len)? })
    }

    /// Queues the copy of `values`, as many as there are. Waits for the last copy, but not for this one.
    fn write(&mut self, stream: &Stream, values: &[T]) -> Result<()> {
        let host = self.host.edit()?;
        if host.len() != values.len() {
            return Err(Error::failure(format!(
                "{} elements of a batch do not fit memory made for {}",
                values.len(),
                host.len()
            )));
        }
        host.copy_from_slice(values);
        self.buffer.write_pinned(stream, &mut self.host)
    }
}

impl<T: Pod> Deref for Staged<T> {
    type Target = Buffer<T>;

    fn deref(&self) -> &Buffer<T> {
        &self.buffer
    }
}

/// Patches on the device.
pub enum Pixels {
    /// `[T, patch_dim]` pixel values.
    U8(Staged<u8>),
    /// `[T, patch_dim]` values that are used as they are.
    F32(Staged<f32>),
}

/// Targets on the device.
pub enum Labels {
    /// `[N]`.
    Classes(Staged<i32>),
    /// `[N, K]`.
    Soft(Staged<f32>),
}

/// A batch in memory that is made once and written step by step, with the step's scalars.
pub struct DeviceBatch {
    shape: BatchShape,
    /// Patches.
    pub patches: Pixels,
    /// `[N + 1]`.
    pub cu_seqlens: Staged<i32>,
    /// 0 and the number of used slots: the `cu_seqlens` of rows that are images.
    pub images: Staged<i32>,
    /// `[T, 2]`.
    pub positions: Staged<u16>,
    /// `[N, 2]`.
    pub grids: Staged<u16>,
    /// Targets.
    pub targets: Labels,
    /// `[N]`.
    pub weights: Staged<f32>,
    /// `[N]`.
    pub sample_ids: Staged<u64>,
    /// `[N]`.
    pub epochs: Staged<u64>,
    /// Seed of the run.
    pub seed: Staged<u64>,
    /// Factor on the loss.
    pub loss_scale: Staged<f32>,
    /// The host's `cu_seqlens`.
    pub(super) host_cu_seqlens: Vec<i32>,
    /// The host's `images`.
    pub(super) host_images: [i32; 2],
}

impl DeviceBatch {
    /// Memory for batches of `shape`, which is of an empty batch at first.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(device: &Device, shape: BatchShape) -> Result<Self> {
        let BatchShape { tokens, slots, patch_dim, .. } = shape;
        Ok(Self {
            shape,
            patches: match shape.wide_patches {
                true => Pixels::F32(Staged::new(device, tokens * patch_dim)?),
                false => Pixels::U8(Staged::new(device, tokens * patch_dim)?),
            },
            cu_seqlens: Staged::new(device, slots + 1)?,
            images: Staged::new(device, 2)?,
            positions: Staged::new(device, 2 * tokens)?,
            grids: Staged::new(device, 2 * slots)?,
            targets: match shape.soft_classes {
                Some(classes) => Labels::Soft(Staged::new(device, slots * classes)?),
                None => Labels::Classes(Staged::new(device, slots)?),
            },
            weights: Staged::new(device, slots)?,
            sample_ids: Staged::new(device, slots)?,
            epochs: Staged::new(device, slots)?,
            seed: Staged::new(device, 1)?,
            loss_scale: Staged::new(device, 1)?,
            host_cu_seqlens: vec![0; slots + 1],
            host_images: [0; 2],
        })
    }

    /// What its batches have in common.
    pub fn shape(&self) -> BatchShape {
        self.shape
    }

    /// Queues the copy of a batch and the scalars of its step.
    ///
    /// # Errors
    /// A batch of another shape, or whose `cu_seqlens` decreases or overruns; a failed device.
    pub fn write(&mut self, stream: &Stream, batch: &PackedBatch, step: &StepState) -> Result<()> {
        let shape = BatchShape { longest: self.shape.longest, ..BatchShape::of(batch) };
        if shape != self.shape || longest(batch) > self.shape.longest {
            return Err(Error::usage(format!(
                "a batch of {:?} does not fit memory made for {:?}; every batch of a run has one shape",
                BatchShape::of(batch),
                self.shape
            )));
        }
        crate::kernels::check_cu_seqlens(&batch.cu_seqlens, shape.slots, shape.tokens)?;
        match (&mut self.patches, &batch.patches) {
            (Pixels::U8(to), Patches::U8(from)) => to.write(stream, from)?,
            (Pixels::F32(to), Patches::F32(from)) => to.write(stream, from)?,
            _ => return Err(Error::failure("patches changed their type between batches")),
        }
        match (&mut self.targets, &batch.targets) {
            (Labels::Classes(to), Targets::Classes(from)) => to.write(stream, from)?,
            (Labels::Soft(to), Targets::Soft(from)) => to.write(stream, from)?,
            _ => return Err(Error::failure("targets changed their type between batches")),
        }
        self.cu_seqlens.write(stream, &batch.cu_seqlens)?;
        self.positions.write(stream, batch.positions.as_flattened())?;
        self.grids.write(stream, batch.grids.as_flattened())?;
        self.weights.write(stream, &batch.weights)?;
        self.sample_ids.write(stream, &batch.sample_ids)?;
        self.epochs.write(stream, &batch.epochs)?;
        self.host_images = [0, batch.images as i32];
        self.images.write(stream, &self.host_images)?;
        self.seed.write(stream, &[step.seed])?;
        self.loss_scale.write(stream, &[step.loss_scale as f32])?;
        self.host_cu_seqlens.copy_from_slice(&batch.cu_seqlens);
        Ok(())
    }
}
