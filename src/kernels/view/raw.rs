//! Launches of the kernels of views that verify nothing.

use half::bf16;

use super::instances::{THREADS, name};
use super::picture::{MIDDLE, MOST_OPS, Record, TILE_ROWS};
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::Result;
use crate::kernels::operand::grid;

/// Blocks of the resizing kernel on a multiprocessor.
const RESIZE_BLOCKS: usize = 4;
/// The means of a picture, and a sum of each warp.
const MEAN_BYTES: u32 = 4 * (MOST_OPS as u32 + THREADS / 32);

/// Arguments of `view_resize`, mirror of `ViewResize`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ResizeParams {
    /// `[pictures]`.
    pub records: Ptr<Record>,
    /// `[2]`: the numbers of pictures and of tiles.
    pub counts: Ptr<i32>,
    /// The bytes of all pictures.
    pub data: Ptr<u8>,
    /// The pixels of all targets, written.
    pub pixels: Ptr<u8>,
}

/// Arguments of `view_mean` and `view_patches`, mirror of `ViewPatches`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatchesParams {
    /// `[pictures]`.
    pub records: Ptr<Record>,
    /// `[2]`: the numbers of pictures and of tiles.
    pub counts: Ptr<i32>,
    /// `[tokens, 3]`: of each token row the picture, counted from 1, and row and column of the patch's first pixel there;
    /// picture 0: none.
    pub rows: Ptr<i32>,
    /// What `view_resize` has written.
    pub pixels: Ptr<u8>,
    /// `[pictures, MOST_OPS]`, workspace.
    pub means: Ptr<i32>,
    /// `[channels, 2]`, see [`factors`](crate::kernels::patch::factors).
    pub factors: Ptr<f32>,
    /// Rows of [`out_stride`](Self::out_stride) elements, all written.
    pub out: Ptr<bf16>,
    /// A multiple of 8, at least the width of a patch.
    pub out_stride: i64,
    /// Pixels along a side of a patch.
    pub side: i32,
}

/// Queues the kernel that resizes pictures of `channels` (1 or 3). Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned, and stays so until the kernel has run; the records
/// lead nowhere else.
pub unsafe fn launch_resize(
    kernels: &Kernels,
    stream: RawStream,
    params: &ResizeParams,
    channels: usize,
    multiprocessors: u32,
) -> Result<()> {
    let blocks = grid(RESIZE_BLOCKS * multiprocessors.max(1) as usize)?;
    let launch = Launch::new(blocks, THREADS, (TILE_ROWS * MIDDLE) as u32);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch(&name("resize", channels), launch, stream, params) }
}

/// Queues the kernels that make patches of `channels` (1 or 3) for `tokens` rows, of up to `pictures` pictures. Allocates
/// nothing and waits for nothing.
///
/// # Errors
/// A grid that is too large, a launch that the device refuses.
///
/// # Safety
/// As for [`launch_resize`].
pub unsafe fn launch_patches(
    kernels: &Kernels,
    stream: RawStream,
    params: &PatchesParams,
    channels: usize,
    tokens: usize,
    pictures: usize,
) -> Result<()> {
    let mean = Launch::new(grid(pictures)?, THREADS, MEAN_BYTES);
    let width = channels * (params.side * params.side) as usize;
    let patches = Launch::new(grid(tokens)?, THREADS, (size_of::<f32>() * width) as u32);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch(&name("mean", channels), mean, stream, params)?;
        kernels.launch(&name("patches", channels), patches, stream, params)
    }
}
