//! Raw launches: constant arguments as the kernels read them, nothing checked, nothing allocated, nothing
//! waited for.

use half::bf16;

use super::arena::{ChunkEntry, TensorEntry};
use super::instances::THREADS;
use super::step::{OptimizerState, OptimizerStep};
use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::{Error, Result};

/// Elements of a block of the flat kernels: eight a thread, four times.
const FLAT_ELEMENTS: u64 = THREADS as u64 * 8 * 4;
/// Two sums in f64 a warp.
pub(super) const SHARED_BYTES: u32 = THREADS / 32 * 2 * 8;

/// Arguments of the gradient norm, mirror of `OptimNorm`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct NormParams {
    /// The arena of the gradients.
    pub grads: Ptr<f32>,
    /// Workspace, `[blocks]`.
    pub partial: Ptr<f64>,
    /// What the host says.
    pub step: Ptr<OptimizerStep>,
    /// Written.
    pub state: Ptr<OptimizerState>,
    /// Elements of the arena, a multiple of 8.
    pub size: i64,
    /// [`norm_blocks`].
    pub blocks: i32,
    /// Fills the struct.
    pub unused: i32,
}

/// Arguments of [`launch_rest_squares`], mirror of `OptimRest`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RestParams {
    /// The arena of the gradients.
    pub grads: Ptr<f32>,
    /// What of it has not been squared.
    pub chunks: Ptr<ChunkEntry>,
    /// Sums of the squares of what has.
    pub squares: Ptr<f64>,
    /// Written, `[blocks]` as of [`NormParams`].
    pub partial: Ptr<f64>,
    /// What the host says.
    pub step: Ptr<OptimizerStep>,
    /// How many [`squares`](Self::squares).
    pub square_count: i64,
    /// How many [`chunks`](Self::chunks).
    pub chunk_count: i32,
    /// Fills the struct.
    pub unused: i32,
}

/// Arguments of AdamW, LAMB and SGD, mirror of `OptimUpdate`. Arenas of one layout, 16-byte aligned.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct UpdateParams {
    /// Parameters, changed in place.
    pub params: Ptr<f32>,
    /// Gradients; LAMB leaves its update here.
    pub grads: Ptr<f32>,
    /// First moments, changed in place.
    pub m: Ptr<f32>,
    /// Second moments, changed in place; null for SGD.
    pub v: Ptr<f32>,
    /// Parameters in bf16, written; may be null.
    pub weights: Ptr<bf16>,
    /// Moving average of the parameters, changed in place; may be null.
    pub average: Ptr<f32>,
    /// Table of the tensors.
    pub tensors: Ptr<TensorEntry>,
    /// Table of the chunks.
    pub chunks: Ptr<ChunkEntry>,
    /// What the host says.
    pub step: Ptr<OptimizerStep>,
    /// What [`launch_norm`] has found.
    pub state: Ptr<OptimizerState>,
    /// LAMB's workspace, `[chunks, 2]`.
    pub partial: Ptr<f64>,
    /// LAMB's workspace, `[tensors]`.
    pub rates: Ptr<f32>,
    /// LAMB of slices: squares of parameters and updates, `[wholes, 2]` of this rank or `[ranks, wholes, 2]`.
    pub squares: Ptr<f64>,
    /// Whether [`weights`](Self::weights) are rounded randomly.
    pub stochastic: i32,
    /// Ranks that [`squares`](Self::squares) are of; 0 where the arena has all of each tensor.
    pub ranks: i32,
    /// Tensors of which the arena has slices.
    pub wholes: i32,
    /// SGD: whether the step looks ahead by one momentum.
    pub nesterov: i32,
}

/// Arguments of [`launch_zero`], mirror of `OptimZero`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ZeroParams {
    /// Written.
    pub out: Ptr<f32>,
    /// What the host says of the step; null writes in any case.
    pub step: Ptr<OptimizerStep>,
    /// Elements, a multiple of 8.
    pub size: i64,
}

/// Arguments of [`launch_add`], mirror of `OptimAdd`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AddParams {
    /// Added to.
    pub out: Ptr<f32>,
    /// Summands.
    pub x: Ptr<f32>,
    /// Elements, a multiple of 8.
    pub size: i64,
}

/// Arguments of [`launch_cast`], mirror of `OptimCast`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CastParams {
    /// Written.
    pub out: Ptr<bf16>,
    /// The arena.
    pub x: Ptr<f32>,
    /// Seed of stochastic rounding; null rounds to nearest.
    pub step: Ptr<OptimizerStep>,
    /// Step of stochastic rounding; null rounds to nearest.
    pub state: Ptr<OptimizerState>,
    /// Elements, a multiple of 8.
    pub size: i64,
}

/// Blocks that sum the squares of `len` gradients: four a multiprocessor, fewer where there is little to sum.
pub fn norm_blocks(multiprocessors: u32, len: usize) -> usize {
    len.div_ceil(FLAT_ELEMENTS as usize).clamp(1, 4 * multiprocessors.max(1) as usize)
}

/// Queues norm, factors and the decision whether the step is taken. Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned, and stays so until the kernels have run.
pub unsafe fn launch_norm(kernels: &Kernels, stream: RawStream, params: &NormParams) -> Result<()> {
    // SAFETY: the caller answers for the addresses.
    unsafe {
        launch_squares(kernels, stream, params)?;
        launch_finish(kernels, stream, params)
    }
}

/// Queues the first half of [`launch_norm`]: a partial sum of squares for each of `blocks` blocks.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_squares(kernels: &Kernels, stream: RawStream, params: &NormParams) -> Result<()> {
    let squares = Launch::new([params.blocks.max(0) as u32, 1, 1], THREADS, SHARED_BYTES);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("optim_squares_f32", squares, stream, params) }
}

/// Queues another first half of [`launch_norm`], `blocks` sums of what has not been squared and of the squares of the rest.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_rest_squares(
    kernels: &Kernels,
    stream: RawStream,
    blocks: usize,
    params: &RestParams,
) -> Result<()> {
    let launch = Launch::new([blocks as u32, 1, 1], THREADS, SHARED_BYTES);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("optim_rest_squares_f32", launch, stream, params) }
}

/// Queues the second half: norm, factors and decision from `blocks` partial sums. Reads no gradients.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_finish(kernels: &Kernels, stream: RawStream, params: &NormParams) -> Result<()> {
    let finish = Launch::new([1, 1, 1], THREADS, SHARED_BYTES);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("optim_finish_f32", finish, stream, params) }
}

/// Queues AdamW over `chunks` chunks, after [`launch_norm`]. Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_adamw(
    kernels: &Kernels,
    stream: RawStream,
    chunks: usize,
    params: &UpdateParams,
) -> Result<()> {
    let launch = Launch::new(grid(chunks as u64)?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("optim_adamw_f32", launch, stream, params) }
}

/// Queues SGD over `chunks` chunks, after [`launch_norm`]. Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_sgd(
    kernels: &Kernels,
    stream: RawStream,
    chunks: usize,
    params: &UpdateParams,
) -> Result<()> {
    let launch = Launch::new(grid(chunks as u64)?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("optim_sgd_f32", launch, stream, params) }
}

/// Queues LAMB over `chunks` chunks of `tensors` tensors, after [`launch_norm`]. Allocates nothing and waits for
/// nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_lamb(
    kernels: &Kernels,
    stream: RawStream,
    chunks: usize,
    tensors: usize,
    params: &UpdateParams,
) -> Result<()> {
    let update = Launch::new(grid(chunks as u64)?, THREADS, SHARED_BYTES);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe {
        kernels.launch("optim_lamb_update_f32", update, stream, params)?;
        launch_lamb_rates(kernels, stream, chunks, tensors, params)
    }
}

/// Queues the first half of [`launch_lamb`] over `chunks` chunks, and the squares of those slices among the first
/// `counted` that are of a tensor.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_lamb_squares(
    kernels: &Kernels,
    stream: RawStream,
    chunks: usize,
    counted: usize,
    params: &UpdateParams,
) -> Result<()> {
    let update = Launch::new(grid(chunks as u64)?, THREADS, SHARED_BYTES);
    let squares = Launch::new(grid(counted as u64)?, THREADS, SHARED_BYTES);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch("optim_lamb_update_f32", update, stream, params)?;
        match counted {
            0 => Ok(()),
            _ => kernels.launch("optim_lamb_squares_f32", squares, stream, params),
        }
    }
}

/// Queues the second half: rates of `tensors` tensors, and what follows for `chunks` chunks. Reads no gradients but
/// the updates that lie there.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_lamb_rates(
    kernels: &Kernels,
    stream: RawStream,
    chunks: usize,
    tensors: usize,
    params: &UpdateParams,
) -> Result<()> {
    let rates = Launch::new(grid(tensors as u64)?, THREADS, SHARED_BYTES);
    let apply = Launch::new(grid(chunks as u64)?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch("optim_lamb_rates_f32", rates, stream, params)?;
        kernels.launch("optim_lamb_apply_f32", apply, stream, params)
    }
}

/// Queues zeros. Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_zero(kernels: &Kernels, stream: RawStream, params: &ZeroParams) -> Result<()> {
    let launch = Launch::new(grid((params.size.max(0) as u64).div_ceil(FLAT_ELEMENTS))?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("optim_zero_f32", launch, stream, params) }
}

/// Queues a sum. Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_add(kernels: &Kernels, stream: RawStream, params: &AddParams) -> Result<()> {
    let launch = Launch::new(grid((params.size.max(0) as u64).div_ceil(FLAT_ELEMENTS))?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("optim_add_f32", launch, stream, params) }
}

/// Queues the copy in bf16. Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// As for [`launch_norm`].
pub unsafe fn launch_cast(kernels: &Kernels, stream: RawStream, params: &CastParams) -> Result<()> {
    let launch = Launch::new(grid((params.size.max(0) as u64).div_ceil(FLAT_ELEMENTS))?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("optim_cast_f32", launch, stream, params) }
}

pub(super) fn grid(blocks: u64) -> Result<[u32; 3]> {
    match i32::try_from(blocks) {
        Ok(blocks) => Ok([blocks as u32, 1, 1]),
        Err(_) => Err(Error::usage(format!(
            "the optimiser would need {blocks} blocks, more than 2^31 - 1; use a smaller model"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_for_the_norm() {
        assert_eq!(norm_blocks(132, 8), 1);
        assert_eq!(norm_blocks(132, 3 * FLAT_ELEMENTS as usize - 64), 3);
        assert_eq!(norm_blocks(132, 300_000_000), 528);
        assert_eq!(norm_blocks(0, 300_000_000), 4);
        assert!(grid(1 << 31).is_err());
    }
}
