//! What a device can do at most: copies and matrix instructions that the benchmarks hold kernels against.

mod rates;

use half::bf16;

use crate::device::{Kernels, Launch, Ptr, RawStream};
use crate::error::Result;
pub use crate::kernels::registry::measure as instances;
use instances::THREADS;
pub use rates::{Rates, fill, rates, seconds};

/// Elements that a block copies: four times 16 bytes a thread.
const COPY_ELEMENTS: usize = 4 * THREADS as usize * 8;
/// Elements of [`MmaParams::values`].
pub const MMA_VALUES: usize = 48 * THREADS as usize;

/// Arguments of the copy, mirror of `MeasureCopy`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CopyParams {
    /// Target.
    pub out: Ptr<bf16>,
    /// Source.
    pub x: Ptr<bf16>,
    /// Elements, a multiple of 8.
    pub size: i64,
}

/// Arguments of the matrix instructions, mirror of `MeasureMma`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MmaParams {
    /// A sum for each thread, [`mma_threads`] of them.
    pub out: Ptr<f32>,
    /// [`MMA_VALUES`] operands.
    pub values: Ptr<bf16>,
    /// Products of a warp, in units of sixteen m16n8k16.
    pub rounds: i32,
}

/// Queues a copy; `2 · 2 · size` bytes are moved.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// Both addresses are valid for `size` elements, 16-byte aligned, until the kernel has run.
pub unsafe fn launch_copy(kernels: &Kernels, stream: RawStream, params: &CopyParams) -> Result<()> {
    let blocks = (params.size as usize).div_ceil(COPY_ELEMENTS) as u32;
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("measure_copy_bf16", Launch::new([blocks, 1, 1], THREADS, 0), stream, params) }
}

/// Blocks that fill the device: two a multiprocessor.
fn mma_blocks(kernels: &Kernels) -> u32 {
    2 * kernels.info().multiprocessors.max(1)
}

/// Threads of [`launch_mma`].
pub fn mma_threads(kernels: &Kernels) -> usize {
    (mma_blocks(kernels) * THREADS) as usize
}

/// Operations of [`launch_mma`] with so many rounds, a multiplication and an addition counted each.
pub fn mma_operations(kernels: &Kernels, rounds: i32) -> f64 {
    mma_threads(kernels) as f64 / 32.0 * f64::from(rounds) * 16.0 * (2 * 16 * 8 * 16) as f64
}

/// Queues matrix instructions on registers.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// The addresses are valid for what their fields say until the kernel has run.
pub unsafe fn launch_mma(kernels: &Kernels, stream: RawStream, params: &MmaParams) -> Result<()> {
    let launch = Launch::new([mma_blocks(kernels), 1, 1], THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("measure_mma_bf16", launch, stream, params) }
}
