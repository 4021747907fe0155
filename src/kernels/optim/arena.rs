//! Where tensors lie in a flat arena, and the tables that tell a block which of them it works on.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::device::{Buffer, Device};
use crate::error::{Error, Result};

/// Elements to which tensors are aligned: 256 bytes of f32, 128 of bf16.
pub const ALIGNMENT: usize = 64;
/// Most elements of a chunk.
pub const CHUNK: usize = 2048;

/// A parameter as the optimiser sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorSpec {
    /// Elements.
    pub len: usize,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Whether LAMB scales its update to the norm of the tensor; by custom, where `weight_decay` is not 0.
    pub adapts: bool,
}

/// What an arena has of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SliceSpec {
    /// The slice as a tensor of its own.
    pub spec: TensorSpec,
    /// The tensor that it is a slice of, which has no other here; none where it is padding.
    pub whole: Option<usize>,
}

/// A tensor on the device, mirror of `OptimTensor`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct TensorEntry {
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Its first chunk.
    pub first_chunk: i32,
    /// Its chunks, one after another.
    pub chunks: i32,
    /// [`TensorSpec::adapts`].
    pub adapts: i32,
    /// The tensor that it is a slice of; of none where negative.
    pub whole: i32,
}

/// At most [`CHUNK`] elements of one tensor, the work of a block; mirror of `OptimChunk`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct ChunkEntry {
    /// First element, a multiple of 8.
    pub start: i64,
    /// Elements, the tensor's last ones filled up to a multiple of 8.
    pub length: i32,
    /// The tensor.
    pub tensor: i32,
}

/// The layout that parameters, gradients, moments, bf16 copy and moving average share: tensors one after another,
/// each from a multiple of [`ALIGNMENT`] on. What lies between them must be 0 (see
/// [`Device::zeros`](crate::device::Device::zeros)); the kernels keep it so.
#[derive(Clone, Debug, PartialEq)]
pub struct Arena {
    ranges: Vec<Range<usize>>,
    len: usize,
    tensors: Vec<TensorEntry>,
    chunks: Vec<ChunkEntry>,
    wholes: usize,
}

impl Arena {
    /// Lays the tensors out.
    ///
    /// # Errors
    /// No elements at all, or more than the kernels count: 2^31 chunks, or 2^35 elements.
    pub fn new(specs: &[TensorSpec]) -> Result<Self> {
        let whole = |(tensor, &spec)| SliceSpec { spec, whole: Some(tensor) };
        let slices: Vec<SliceSpec> = specs.iter().enumerate().map(whole).collect();
        Self::of_slices(&slices, specs.len())
    }

    /// Lays out the slices of `wholes` tensors.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    ///
    /// # Panics
    /// If a slice is of a tensor beyond `wholes`: a bug of the caller, not of a user.
    pub fn of_slices(slices: &[SliceSpec], wholes: usize) -> Result<Self> {
        let (mut ranges, mut tensors, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        let mut len = 0usize;
        for (tensor, SliceSpec { spec, whole }) in slices.iter().enumerate() {
            assert!(whole.is_none_or(|whole| whole < wholes), "a slice of {whole:?} among {wholes} tensors");
            let end = len.checked_add(spec.len).filter(|&end| end <= 1 << 35).ok_or_else(|| {
                Error::usage(format!(
                    "the parameters have more than 2^35 elements at the {tensor}. one of {}; use a smaller model",
                    spec.len
                ))
            })?;
            let first_chunk = chunks.len();
            for start in (len..end).step_by(CHUNK) {
                let length = (end - start).min(CHUNK).next_multiple_of(8);
                chunks.push(ChunkEntry { start: start as i64, length: length as i32, tensor: tensor as i32 });
            }
            tensors.push(TensorEntry {
                weight_decay: spec.weight_decay,
                first_chunk: first_chunk as i32,
                chunks: (chunks.len() - first_chunk) as i32,
                adapts: i32::from(spec.adapts),
                whole: whole.map_or(-1, |whole| whole as i32),
            });
            ranges.push(len..end);
            len = end.next_multiple_of(ALIGNMENT);
        }
        if chunks.is_empty() {
            return Err(Error::usage("the optimiser has no parameters; give it at least one element"));
        }
        if i32::try_from(chunks.len()).is_err() {
            return Err(Error::usage(format!(
                "the parameters are {} chunks, more than 2^31 - 1",
                chunks.len()
            )));
        }
        Ok(Self { ranges, len, tensors, chunks, wholes })
    }

    /// Elements of an arena, a multiple of [`ALIGNMENT`].
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements of each tensor, in the order given.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Tensors as the kernels read them.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// How many tensors it has slices of.
    pub fn wholes(&self) -> usize {
        self.wholes
    }

    /// Chunks as the kernels read them.
    pub fn chunks(&self) -> &[ChunkEntry] {
        &self.chunks
    }

    /// The tables on a device.
    ///
    /// # Errors
    /// The device has no room.
    pub fn upload(&self, device: &Device) -> Result<Tables> {
        Ok(Tables { tensors: device.upload(&self.tensors)?, chunks: device.upload(&self.chunks)? })
    }
}

/// The tables of an [`Arena`] in device memory.
pub struct Tables {
    /// [`Arena::tensors`].
    pub tensors: Buffer<TensorEntry>,
    /// [`Arena::chunks`].
    pub chunks: Buffer<ChunkEntry>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_every_tensor_once() {
        let lengths = [1, 0, 64, 2048, 2049, 10_000, 7];
        let specs = lengths.map(|len| TensorSpec { len, weight_decay: 0.1, adapts: len > 64 });
        let arena = Arena::new(&specs).unwrap();
        let mut owner = vec![None; arena.len()];
        for (i, (range, entry)) in arena.ranges().iter().zip(arena.tensors()).enumerate() {
            assert_eq!((range.len(), range.start % ALIGNMENT), (lengths[i], 0));
            let chunks = &arena.chunks()[entry.first_chunk as usize..][..entry.chunks as usize];
            for chunk in chunks {
                assert_eq!((chunk.tensor, chunk.length % 8, chunk.start % 8), (i as i32, 0, 0));
                assert!(chunk.length > 0 && chunk.length as usize <= CHUNK);
                for at in chunk.start..chunk.start + i64::from(chunk.length) {
                    assert_eq!(owner[at as usize].replace(i), None, "element {at}");
                }
            }
            assert!(range.clone().all(|at| owner[at] == Some(i)));
        }
        assert!(arena.len().is_multiple_of(ALIGNMENT) && !arena.is_empty());
    }

    #[test]
    fn sizes_are_checked() {
        let spec = TensorSpec { len: 0, weight_decay: 0.0, adapts: false };
        assert!(Arena::new(&[]).is_err() && Arena::new(&[spec; 3]).is_err());
        assert!(Arena::new(&[TensorSpec { len: usize::MAX, ..spec }]).is_err());
    }
}
