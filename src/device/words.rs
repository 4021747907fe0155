//! Pinned host memory of devices that are none: plain memory, which the system maps where it is first touched.

use super::backend::HostMemory;
use crate::{Error, Result};

/// Host memory, aligned for every element.
pub(super) struct Words {
    words: Vec<u128>,
    /// How many count.
    bytes: usize,
}

impl Words {
    /// Memory of `bytes` bytes, all 0.
    pub(super) fn new(bytes: usize) -> Result<Self> {
        let words = bytemuck::allocation::try_zeroed_vec(bytes.div_ceil(size_of::<u128>()));
        let words =
            words.map_err(|()| Error::failure(format!("{bytes} bytes of pinned memory cannot be had")))?;
        Ok(Self { words, bytes })
    }
}

impl HostMemory for Words {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.bytes]
    }
}
