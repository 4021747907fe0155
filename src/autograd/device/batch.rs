//! The packed batch and the scalars of a step in device memory.

use std::ops::{Deref, Range};

use bytemuck::Pod;

use super::super::op::StepState;
use super::super::split::Shard;
use super::layout::ALIGNMENT;
use super::shape::{BatchShape, TextShape, image_rows, longest};
use crate::data::batch::{Mixture, Modality, PackedBatch, Patches, Pictures, Targets};
use crate::device::{Buffer, Device, Pinned, Stream};
use crate::error::{Error, Result};
use crate::kernels::view::{self, Record};

/// A part of a batch's memory.
pub struct Field<T: Pod> {
    buffer: Buffer<T>,
    /// Where it lies in that memory.
    bytes: Range<usize>,
}

impl<T: Pod> Field<T> {
    /// Sets the part of `host` that is this field.
    fn put(&self, host: &mut [u8], values: &[T]) -> Result<()> {
        match values.len() == self.buffer.len() {
            true => self.put_first(host, values),
            false => Err(self.misfit(values)),
        }
    }

    /// Sets its first elements; the others stay.
    fn put_first(&self, host: &mut [u8], values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        match host[self.bytes.clone()].get_mut(..bytes.len()) {
            Some(place) => place.copy_from_slice(bytes),
            None => return Err(self.misfit(values)),
        }
        Ok(())
    }

    fn misfit(&self, values: &[T]) -> Error {
        Error::failure(format!(
            "{} elements of a batch do not fit memory made for {}",
            values.len(),
            self.buffer.len()
        ))
    }
}

/// Mixtures as soft targets `[N, classes]`.
fn soft(mixtures: &[Mixture], classes: usize) -> Result<Vec<f32>> {
    let mut soft = vec![0.0; mixtures.len() * classes];
    for (row, mixture) in soft.chunks_exact_mut(classes.max(1)).zip(mixtures) {
        for (&class, &share) in mixture.classes.iter().zip(&mixture.shares) {
            match usize::try_from(class).ok().and_then(|class| row.get_mut(class)) {
                Some(target) => *target += share,
                None => return Err(Error::usage(format!("label {class} is no class of {classes}"))),
            }
        }
    }
    Ok(soft)
}

impl<T: Pod> Deref for Field<T> {
    type Target = Buffer<T>;

    fn deref(&self) -> &Buffer<T> {
        &self.buffer
    }
}

/// Lays fields out one after another, each aligned as [`ALIGNMENT`] says.
#[derive(Default)]
struct Fields {
    bytes: usize,
}

impl Fields {
    fn next<T: Pod>(&mut self, len: usize) -> Range<usize> {
        let start = self.bytes.next_multiple_of(ALIGNMENT);
        self.bytes = start + len * size_of::<T>();
        start..self.bytes
    }
}

fn field<T: Pod>(block: &Buffer<u8>, bytes: Range<usize>) -> Result<Field<T>> {
    Ok(Field { buffer: block.view(bytes.clone())?, bytes })
}

/// Patches on the device.
pub enum Pixels {
    /// `[T, patch_dim]` pixel values.
    U8(Field<u8>),
    /// `[T, patch_dim]` values that are used as they are.
    F32(Field<f32>),
    /// What patches are made of.
    Pictures(PictureFields),
}

/// Pictures on the device.
pub struct PictureFields {
    /// `[pictures]`.
    pub records: Field<Record>,
    /// The numbers of pictures and of tiles.
    pub counts: Field<i32>,
    /// `[T, 3]`.
    pub rows: Field<i32>,
    /// The bytes of all pictures. They end the block: what a batch does not fill is not copied.
    pub data: Field<u8>,
}

impl PictureFields {
    /// Sets all of it in `host`, and returns where what it needs of the block ends.
    fn put(&self, host: &mut [u8], from: &Pictures) -> Result<usize> {
        from.shape.check(&from.pictures, &from.rows)?;
        let (records, counts) = view::records(&from.pictures);
        self.records.put_first(host, &records)?;
        self.counts.put(host, &counts)?;
        self.rows.put(host, from.rows.as_flattened())?;
        let mut end = self.data.bytes.start;
        for picture in from.pictures.iter() {
            let bytes = picture.bytes();
            let place = host[..self.data.bytes.end].get_mut(end..end + bytes.len());
            place.ok_or_else(|| self.data.misfit(bytes))?.copy_from_slice(bytes);
            end += bytes.len();
        }
        Ok(end)
    }
}

/// Targets on the device.
pub enum Labels {
    /// `[N]`.
    Classes(Field<i32>),
    /// `[N, K]`.
    Soft(Field<f32>),
}

/// A batch in memory that is made once and written step by step, with the step's scalars: one block, filled by
/// one copy from pinned host memory, which runs beside everything else.
pub struct DeviceBatch {
    shape: BatchShape,
    /// The texts of the slots.
    texts: Option<Box<DeviceBatch>>,
    block: Buffer<u8>,
    host: Pinned<u8>,
    /// Patches.
    pub patches: Pixels,
    /// `[N + 1]`.
    pub cu_seqlens: Field<i32>,
    /// 0 and the number of used slots: the `cu_seqlens` of rows that are images.
    pub images: Field<i32>,
    /// 0 and the number of live tokens that the tensor axis leaves to this rank: the `cu_seqlens` of its rows.
    pub shard: Field<i32>,
    /// `[T, 2]`.
    pub positions: Field<u16>,
    /// `[N, 2]`.
    pub grids: Field<u16>,
    /// Targets.
    pub targets: Labels,
    /// `[N]`.
    pub weights: Field<f32>,
    /// `[N]`.
    pub sample_ids: Field<u64>,
    /// `[N]`.
    pub epochs: Field<u64>,
    /// Seed of the run.
    pub seed: Field<u64>,
    /// Factor on the loss.
    pub loss_scale: Field<f32>,
    /// The host's `cu_seqlens`.
    pub(super) host_cu_seqlens: Vec<i32>,
    /// The host's `images`.
    pub(super) host_images: [i32; 2],
    /// The host's `shard`.
    pub(super) host_shard: [i32; 2],
    part: Shard,
}

impl DeviceBatch {
    /// Memory for batches of `shape`, which is of an empty batch at first, of which `part` of the tensor axis is this
    /// rank's.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(device: &Device, shape: BatchShape, part: Shard) -> Result<Self> {
        let BatchShape { tokens, slots, patch_dim, .. } = shape;
        let mut fields = Fields::default();
        let patches = match (shape.wide_patches, shape.views) {
            (true, _) => fields.next::<f32>(tokens * patch_dim),
            (false, None) => fields.next::<u8>(tokens * patch_dim),
            (false, Some(views)) => fields.next::<Record>(views.pictures),
        };
        let targets = match shape.soft_classes {
            Some(classes) => fields.next::<f32>(slots * classes),
            None => fields.next::<i32>(slots),
        };
        let (cu_seqlens, images) = (fields.next::<i32>(slots + 1), fields.next::<i32>(2));
        let shard = fields.next::<i32>(2);
        let (positions, grids) = (fields.next::<u16>(2 * tokens), fields.next::<u16>(2 * slots));
        let weights = fields.next::<f32>(slots);
        let (sample_ids, epochs) = (fields.next::<u64>(slots), fields.next::<u64>(slots));
        let (seed, loss_scale) = (fields.next::<u64>(1), fields.next::<f32>(1));
        let views = shape.views.map(|views| {
            (fields.next::<i32>(2), fields.next::<i32>(3 * tokens), fields.next::<u8>(views.bytes))
        });
        let block = device.zeros(fields.bytes)?;
        let texts = match shape.texts {
            Some(_) => Some(Box::new(Self::new(device, shape.of_modality(Modality::Texts)?, Shard::WHOLE)?)),
            None => None,
        };
        Ok(Self {
            shape,
            texts,
            patches: match (shape.wide_patches, views) {
                (true, _) => Pixels::F32(field(&block, patches)?),
                (false, None) => Pixels::U8(field(&block, patches)?),
                (false, Some((counts, rows, data))) => Pixels::Pictures(PictureFields {
                    records: field(&block, patches)?,
                    counts: field(&block, counts)?,
                    rows: field(&block, rows)?,
                    data: field(&block, data)?,
                }),
            },
            targets: match shape.soft_classes {
                Some(_) => Labels::Soft(field(&block, targets)?),
                None => Labels::Classes(field(&block, targets)?),
            },
            cu_seqlens: field(&block, cu_seqlens)?,
            images: field(&block, images)?,
            shard: field(&block, shard)?,
            positions: field(&block, positions)?,
            grids: field(&block, grids)?,
            weights: field(&block, weights)?,
            sample_ids: field(&block, sample_ids)?,
            epochs: field(&block, epochs)?,
            seed: field(&block, seed)?,
            loss_scale: field(&block, loss_scale)?,
            host_cu_seqlens: vec![0; slots + 1],
            host_images: [0; 2],
            host_shard: [0; 2],
            part,
            host: device.pinned(fields.bytes)?,
            block,
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.block.len() + self.texts.as_ref().map_or(0, |texts| texts.bytes())
    }

    /// The batch of the images or of the texts.
    ///
    /// # Panics
    /// If texts are asked for and there are none: an executor over them is not made.
    pub(super) fn of(&self, modality: Modality) -> &Self {
        match modality {
            Modality::Images => self,
            Modality::Texts => self.texts.as_deref().expect("memory was made for texts"),
        }
    }

    /// What its batches have in common.
    pub fn shape(&self) -> BatchShape {
        self.shape
    }

    /// Queues the copy of a batch and the scalars of its step. Waits for the copy before it, but not for this one.
    ///
    /// # Errors
    /// A batch of another shape, or whose `cu_seqlens` decreases or overruns; a failed device.
    pub fn write(&mut self, stream: &Stream, batch: &PackedBatch, step: &StepState) -> Result<()> {
        let BatchShape { image_rows: most, longest: axis, .. } = self.shape;
        let mut shape = BatchShape { image_rows: most, longest: axis, ..BatchShape::of(batch) };
        // How long the texts are, their own batch checks.
        shape.texts =
            shape.texts.zip(self.shape.texts).map(|(given, made)| TextShape { rows: made.rows, ..given });
        if matches!(batch.targets, Targets::Mixed(_)) {
            shape.soft_classes = self.shape.soft_classes;
        }
        if longest(batch) > axis {
            return Err(Error::usage(format!(
                "an image of the batch has {} patches along an axis, and positions are prepared for {axis} on the device; \
                 lower its resolution, or use --device cpu",
                longest(batch)
            )));
        }
        if image_rows(batch) > most {
            return Err(Error::usage(format!(
                "an image of the batch has {} tokens, and attention is prepared for {most} on the device; lower its \
                 resolution, or use --device cpu",
                image_rows(batch)
            )));
        }
        if shape != self.shape {
            return Err(Error::usage(format!(
                "a batch of {:?} does not fit memory made for {:?}; every batch of a run has one shape",
                BatchShape::of(batch),
                self.shape
            )));
        }
        if let (Some(to), Some(from)) = (&mut self.texts, &batch.texts) {
            to.write(stream, from, step)?;
        }
        crate::kernels::check_cu_seqlens(&batch.cu_seqlens, shape.slots, shape.tokens)?;
        self.host_images = [0, batch.images as i32];
        let own = self.part.live(batch.live_tokens(), shape.tokens / self.part.size);
        self.host_shard = [0, own as i32];
        self.host_cu_seqlens.copy_from_slice(&batch.cu_seqlens);
        let host = self.host.edit()?;
        let mut end = host.len();
        match (&self.patches, &batch.patches) {
            (Pixels::U8(to), Patches::U8(from)) => to.put(host, from)?,
            (Pixels::F32(to), Patches::F32(from)) => to.put(host, from)?,
            (Pixels::Pictures(to), Patches::Pictures(from)) => end = to.put(host, from)?,
            _ => return Err(Error::failure("patches changed their type between batches")),
        }
        match (&self.targets, &batch.targets) {
            (Labels::Classes(to), Targets::Classes(from)) => to.put(host, from)?,
            (Labels::Soft(to), Targets::Soft(from)) => to.put(host, from)?,
            (Labels::Soft(to), Targets::Mixed(from)) => {
                to.put(host, &soft(from, shape.soft_classes.unwrap_or(0))?)?;
            }
            _ => return Err(Error::failure("targets changed their type between batches")),
        }
        self.cu_seqlens.put(host, &batch.cu_seqlens)?;
        self.images.put(host, &self.host_images)?;
        self.shard.put(host, &self.host_shard)?;
        self.positions.put(host, batch.positions.as_flattened())?;
        self.grids.put(host, batch.grids.as_flattened())?;
        self.weights.put(host, &batch.weights)?;
        self.sample_ids.put(host, &batch.sample_ids)?;
        self.epochs.put(host, &batch.epochs)?;
        self.seed.put(host, &[step.seed])?;
        self.loss_scale.put(host, &[step.loss_scale as f32])?;
        self.block.write_pinned_first(stream, &mut self.host, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceInfo;
    use crate::recipe::Recipe;

    #[test]
    fn mixtures_become_soft_targets() {
        let mixtures = [Mixture::new(2, 0, 0.25), Mixture::one(1), Mixture::new(0, 1, 1.0).binarised()];
        let rows = [0.75, 0.0, 0.25, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0];
        assert_eq!(soft(&mixtures, 3).unwrap(), rows);
        for wrong in [3, -1] {
            let told = soft(&[Mixture::one(wrong)], 3).unwrap_err().to_string();
            assert!(told.contains(&format!("label {wrong} is no class of 3")), "{told}");
        }
    }

    /// Targets of any kind find a place in memory that is made for a training of mixed images, and no other does.
    #[test]
    fn memory_is_made_for_the_targets_of_a_recipe() {
        let mut recipe = Recipe::default();
        recipe.packing.tokens = 256;
        assert_eq!(BatchShape::of_training(&recipe, 10, 2).soft_classes, None);
        recipe.mix.cutmix = 1.0;
        let shape = BatchShape::of_training(&recipe, 10, 2);
        assert_eq!(BatchShape { soft_classes: None, ..shape }, BatchShape::of_recipe(&recipe, 2, 0));
        let patches = Patches::U8(vec![0; 256 * shape.patch_dim]);
        let batch = |targets| PackedBatch {
            patches: patches.clone(),
            patch_dim: shape.patch_dim,
            cu_seqlens: vec![0; 3],
            positions: vec![[0; 2]; 256],
            grids: vec![[0; 2]; 2],
            targets,
            weights: vec![0.0; 2],
            sample_ids: vec![0; 2],
            epochs: vec![0; 2],
            images: 0,
            texts: None,
        };
        let device = Device::planned(DeviceInfo::h100());
        let stream = device.stream().unwrap();
        let write = |shape, targets| {
            DeviceBatch::new(&device, shape, Shard::WHOLE)?.write(
                &stream,
                &batch(targets),
                &StepState::default(),
            )
        };
        write(shape, Targets::Mixed(vec![Mixture::one(9); 2])).unwrap();
        write(shape, Targets::Soft(vec![0.1; 20])).unwrap();
        write(shape, Targets::Classes(vec![0; 2])).unwrap_err();
        write(shape, Targets::Mixed(vec![Mixture::one(10); 2])).unwrap_err();
        let plain = BatchShape { soft_classes: None, ..shape };
        write(plain, Targets::Classes(vec![0; 2])).unwrap();
        write(plain, Targets::Mixed(vec![Mixture::one(9); 2])).unwrap_err();
    }
}
