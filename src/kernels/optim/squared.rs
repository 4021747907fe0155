//! Gradients whose squares are known before the norm is taken.

use std::collections::HashSet;

use super::arena::{Arena, ChunkEntry};
use super::raw::norm_blocks;
use crate::device::{Buffer, Device};
use crate::error::Result;

/// Sums of the squares of some tensors of an arena, as whatever writes these gradients leaves them, and what is to be
/// read for the others.
pub struct Squared {
    pub(super) chunks: Buffer<ChunkEntry>,
    pub(super) sums: Buffer<f64>,
    /// Elements of the arena it is of.
    pub(super) arena: usize,
    pub(super) blocks: usize,
    rest: usize,
}

impl Squared {
    /// Of the tensors `known` of an arena, whose squares are all together the sum of `sums`.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(device: &Device, arena: &Arena, known: &[usize], sums: Buffer<f64>) -> Result<Self> {
        let known: HashSet<i32> = known.iter().map(|&tensor| tensor as i32).collect();
        let unknown = |chunk: &&ChunkEntry| !known.contains(&chunk.tensor);
        let chunks: Vec<ChunkEntry> = arena.chunks().iter().filter(unknown).copied().collect();
        let rest: usize = chunks.iter().map(|chunk| chunk.length as usize).sum();
        Ok(Self {
            chunks: device.upload(&chunks)?,
            // No more than the workspace of the arena's own sums has room for.
            blocks: norm_blocks(device.info().multiprocessors, (rest + sums.len()).min(arena.len())),
            arena: arena.len(),
            sums,
            rest,
        })
    }

    /// Bytes that the norm reads.
    pub fn bytes(&self) -> usize {
        self.rest * size_of::<f32>() + self.sums.len() * size_of::<f64>()
    }
}
