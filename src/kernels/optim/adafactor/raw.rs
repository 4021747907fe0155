//! Raw launches of Adafactor: nothing checked, nothing allocated, nothing waited for.

use half::bf16;

use super::super::instances::THREADS;
use super::super::raw::{SHARED_BYTES, UpdateParams, grid};
use super::tables::{FactoredEntry, TILE_COLUMNS, WholeEntry};
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::Result;

/// Sums of a tile's columns by each warp.
const TILE_BYTES: u32 = THREADS / 32 * TILE_COLUMNS as u32 * 4;
/// Sums of warps, and what follows from them.
const MOMENT_BYTES: u32 = SHARED_BYTES + 8;

/// Arguments of Adafactor, mirror of `OptimAdafactor`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AdafactorParams {
    /// What all optimisers take; moments and LAMB's are null.
    pub update: UpdateParams,
    /// Momentum, an arena, changed in place.
    pub m: Ptr<bf16>,
    /// Second moments of whole parameters, changed in place.
    pub v: Ptr<f32>,
    /// Sums of squared gradients, of their shape: 0 to begin with.
    pub sums: Ptr<f32>,
    /// Workspace of their shape.
    pub factors: Ptr<f32>,
    /// Workspace, `[lines]`.
    pub line_factors: Ptr<f32>,
    /// Workspace, sums of each tile's rows and columns.
    pub partial: Ptr<f32>,
    /// Table of the tensors.
    pub tensors: Ptr<FactoredEntry>,
    /// Table of the whole parameters.
    pub wholes: Ptr<WholeEntry>,
    /// The tensor of each tile.
    pub tile_tensors: Ptr<i32>,
    /// The tensor of each block of lines.
    pub line_tensors: Ptr<i32>,
    /// Where each line's sum goes; negative: nowhere.
    pub places: Ptr<i32>,
    /// Tensors that this rank counts, from the first.
    pub counted: i32,
    /// Fills the struct.
    pub unused: i32,
}

/// Numbers of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdafactorBlocks {
    /// Tiles of gradients.
    pub tiles: usize,
    /// Blocks of lines.
    pub lines: usize,
    /// Whole parameters.
    pub wholes: usize,
    /// Chunks of the arena.
    pub chunks: usize,
}

/// Queues the sums of squared gradients, of the tensors that this rank counts, after [`launch_norm`] or
/// [`launch_finish`].
///
/// [`launch_norm`]: crate::kernels::optim::launch_norm
/// [`launch_finish`]: crate::kernels::optim::launch_finish
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned, and stays so until the kernels have run.
pub unsafe fn launch_adafactor_sums(
    kernels: &Kernels,
    stream: RawStream,
    blocks: AdafactorBlocks,
    params: &AdafactorParams,
) -> Result<()> {
    let squares = Launch::new(grid(blocks.tiles as u64)?, THREADS, TILE_BYTES);
    let sums = Launch::new(grid(blocks.lines as u64)?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        // A rank may have padding alone.
        if blocks.tiles > 0 {
            kernels.launch("optim_adafactor_squares_f32", squares, stream, params)?;
            kernels.launch("optim_adafactor_sums_f32", sums, stream, params)?;
        }
    }
    Ok(())
}

/// Queues the rest of a step from the sums.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_adafactor_sums`].
pub unsafe fn launch_adafactor_of(
    kernels: &Kernels,
    stream: RawStream,
    blocks: AdafactorBlocks,
    params: &AdafactorParams,
) -> Result<()> {
    let moments = Launch::new(grid(blocks.wholes as u64)?, THREADS, MOMENT_BYTES);
    let lines = Launch::new(grid(blocks.lines as u64)?, THREADS, 0);
    let apply = Launch::new(grid(blocks.chunks as u64)?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch("optim_adafactor_moments_f32", moments, stream, params)?;
        if blocks.lines > 0 {
            kernels.launch("optim_adafactor_lines_f32", lines, stream, params)?;
        }
        kernels.launch("optim_adafactor_apply_f32", apply, stream, params)
    }
}
