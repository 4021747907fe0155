//! Tensor maps: how a kernel of the sm90 tier copies boxes of a tensor with one instruction.

use bytemuck::{Pod, Zeroable};

use crate::{Error, Result};

/// A tensor in device memory and the boxes of it that a kernel copies, as one of the kernel's constant arguments
/// (`TensorMap` in `kernels/common/hopper.cuh`). Good for the device that made it.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct TensorMap(pub(super) [u64; 16]);

/// What a tensor is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorElement {
    /// The upper half of an f32.
    Bf16,
    /// An f32.
    F32,
}

impl TensorElement {
    /// Bytes of an element.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Where the 16-byte chunks of a box lie in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorSwizzle {
    /// In order.
    None,
    /// Rows of 32 bytes: bit 7 of the address is added to bit 4.
    Bytes32,
    /// Rows of 64 bytes: bits 7 and 8 to bits 4 and 5.
    Bytes64,
    /// Rows of 128 bytes: bits 7 to 9 to bits 4 to 6.
    Bytes128,
}

impl TensorSwizzle {
    /// Bytes of a row; `None` where rows may have any length.
    pub const fn row_bytes(self) -> Option<u32> {
        match self {
            Self::None => None,
            Self::Bytes32 => Some(32),
            Self::Bytes64 => Some(64),
            Self::Bytes128 => Some(128),
        }
    }
}

/// A tensor of 1 to 5 dimensions and the shape of its boxes. Everything is listed innermost first.
#[derive(Clone, Copy, Debug)]
pub struct TensorBoxes<'a> {
    /// What it is made of.
    pub element: TensorElement,
    /// Address of the first element, a multiple of 16.
    pub address: u64,
    /// Elements along each dimension.
    pub sizes: &'a [u32],
    /// Bytes from one element to the next along every dimension but the innermost, multiples of 16.
    pub strides: &'a [u64],
    /// Elements of a box along each dimension, at most 256.
    pub tile: &'a [u32],
    /// How a box lies in shared memory. A row of it is the box along the innermost dimension.
    pub swizzle: TensorSwizzle,
}

impl TensorBoxes<'_> {
    /// Refuses what the hardware cannot do.
    pub(super) fn check(&self) -> Result<()> {
        let refused = |what: String| Err(Error::usage(format!("a tensor map cannot be made: {what}")));
        let rank = self.sizes.len();
        if !(1..=5).contains(&rank) || self.tile.len() != rank || self.strides.len() != rank - 1 {
            return refused(format!(
                "{rank} sizes, {} strides and {} sides of a box; it has 1 to 5 dimensions, and a stride for each but one",
                self.strides.len(),
                self.tile.len()
            ));
        }
        if !self.address.is_multiple_of(16) || self.address == 0 {
            return refused(format!("the address {:#x} is not a multiple of 16", self.address));
        }
        if self.sizes.contains(&0) {
            return refused(format!("the sizes {:?} are empty", self.sizes));
        }
        if self.strides.iter().any(|&stride| stride == 0 || !stride.is_multiple_of(16) || stride >= 1 << 40) {
            return refused(format!("the strides {:?} are not all multiples of 16 bytes", self.strides));
        }
        if self.tile.iter().any(|side| !(1..=256).contains(side)) {
            return refused(format!("the sides {:?} of a box are not all from 1 to 256", self.tile));
        }
        let row = self.tile[0] * self.element.bytes();
        match self.swizzle.row_bytes() {
            Some(bytes) if row != bytes => refused(format!("rows of {row} bytes, swizzled by {bytes}")),
            None if !row.is_multiple_of(16) => refused(format!("rows of {row} bytes, no multiple of 16")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_hardware_cannot_do_is_refused() {
        let good = TensorBoxes {
            element: TensorElement::Bf16,
            address: 0x1000,
            sizes: &[100, 7],
            strides: &[208],
            tile: &[64, 8],
            swizzle: TensorSwizzle::Bytes128,
        };
        assert!(good.check().is_ok());
        for (bad, expected) in [
            (TensorBoxes { sizes: &[100], ..good }, "1 sizes, 1 strides"),
            (TensorBoxes { address: 0x1008, ..good }, "the address 0x1008"),
            (TensorBoxes { sizes: &[100, 0], ..good }, "are empty"),
            (TensorBoxes { strides: &[200], ..good }, "the strides [200]"),
            (TensorBoxes { tile: &[64, 257], ..good }, "the sides [64, 257]"),
            (TensorBoxes { tile: &[32, 8], ..good }, "rows of 64 bytes, swizzled by 128"),
            (
                TensorBoxes { tile: &[4, 8], swizzle: TensorSwizzle::None, ..good },
                "rows of 8 bytes, no multiple of 16",
            ),
        ] {
            let message = bad.check().expect_err(expected).to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
