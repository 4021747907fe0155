//! Tensor maps as the emulator reads them.

use bytemuck::{Pod, Zeroable};

use crate::device::tensor_map::{TensorBoxes, TensorMap};

/// Tells a map of the emulator from anything else: "tens_map".
const MAGIC: u64 = 0x7061_6d5f_736e_6574;

/// `emulator::Map`, and what fills it up to a `TensorMap`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Map {
    magic: u64,
    base: u64,
    strides: [u64; 4],
    sizes: [u32; 5],
    tile: [u32; 5],
    rank: u32,
    element: u32,
    /// Bits 7 to 9 of an address that count.
    swizzle: u32,
    unused: [u32; 7],
}

/// `values`, and `rest` where there are no more of them.
fn filled<T: Copy, const N: usize>(values: &[T], rest: T) -> [T; N] {
    std::array::from_fn(|i| values.get(i).copied().unwrap_or(rest))
}

/// The map of boxes that were checked.
pub(in crate::device) fn encode(boxes: &TensorBoxes) -> TensorMap {
    let map = Map {
        magic: MAGIC,
        base: boxes.address,
        strides: filled(boxes.strides, 0),
        sizes: filled(boxes.sizes, 1),
        tile: filled(boxes.tile, 1),
        rank: boxes.sizes.len() as u32,
        element: boxes.element.bytes(),
        swizzle: boxes.swizzle.row_bytes().map_or(0, |bytes| bytes / 16 - 1),
        unused: [0; 7],
    };
    TensorMap(bytemuck::cast(map))
}
