//! Sums of vectors of several ranks that share a device: what
//! [`DeviceGroup`](crate::parallel::device::DeviceGroup) reduces by where no NCCL does.

use bytemuck::Pod;
use half::bf16;

use crate::device::{Buffer, Kernels, Launch, Ptr, RawStream, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{check_len, grid};

pub use super::registry::collective as instances;
use instances::THREADS;

/// Most ranks that one launch sums.
pub const MOST_RANKS: usize = 64;

/// Arguments of the sum, mirror of `CollectiveSumRanks`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SumRanksParams<T> {
    /// `[size]`, all written; may be one of the parts.
    pub out: Ptr<T>,
    /// Elements.
    pub size: i64,
    /// Number of parts, 1 to [`MOST_RANKS`].
    pub ranks: i32,
    /// Not 0: every address is a multiple of 16.
    pub aligned: i32,
    /// `[size]` each, in the order in which they are summed; the others are not read.
    pub parts: [Ptr<T>; MOST_RANKS],
}

impl<T> SumRanksParams<T> {
    /// The sum of `size` elements of `parts`, at most [`MOST_RANKS`].
    pub fn new(out: Ptr<T>, parts: &[Ptr<T>], size: usize) -> Self {
        let mut all = [Ptr::null(); MOST_RANKS];
        all[..parts.len()].copy_from_slice(parts);
        let aligned = parts.iter().chain([&out]).all(|part| part.address().is_multiple_of(16));
        Self { out, size: size as i64, ranks: parts.len() as i32, aligned: aligned.into(), parts: all }
    }
}

pub(crate) mod sealed {
    /// Elements that there is a kernel for.
    pub trait Element {
        /// Whether it is bf16, else f32.
        const BF16: bool;
    }
}

impl sealed::Element for f32 {
    const BF16: bool = false;
}

impl sealed::Element for bf16 {
    const BF16: bool = true;
}

/// Elements that ranks sum: `f32`, and `bf16`, which is summed in f32 and rounded once.
pub trait Summed: Pod + sealed::Element {}

impl Summed for f32 {}
impl Summed for bf16 {}

/// Queues `out[i] = parts[0][i] + parts[1][i] + …`, in this order. `out` may be one of the parts.
///
/// # Errors
/// No part or more than [`MOST_RANKS`], lengths that differ, a launch that the device refuses.
pub fn sum_ranks<T: Summed>(stream: &Stream, out: &Buffer<T>, parts: &[&Buffer<T>]) -> Result<()> {
    if parts.is_empty() || parts.len() > MOST_RANKS {
        return Err(Error::usage(format!(
            "{} vectors cannot be summed by one launch, expected 1 to {MOST_RANKS}",
            parts.len()
        )));
    }
    let pointers = parts.iter().map(|part| check_len("part", part, &[out.len()]));
    let params = SumRanksParams::new(out.ptr(), &pointers.collect::<Result<Vec<_>>>()?, out.len());
    if out.is_empty() {
        return Ok(());
    }
    // SAFETY: the operands are live buffers of the same length; the stream orders their later use.
    unsafe { launch_sum_ranks(stream.device().kernels(), stream.raw(), &params) }
}

/// Queues the sum. Allocates nothing and waits for nothing.
///
/// # Errors
/// A grid that is too large, a launch that the device refuses.
///
/// # Safety
/// `out` and the first `ranks` of `parts` are valid for `size` elements of `T`, at addresses that are as `aligned` says
/// and otherwise aligned for `T`, and stay so until the kernel has run.
pub unsafe fn launch_sum_ranks<T: Summed>(
    kernels: &Kernels,
    stream: RawStream,
    params: &SumRanksParams<T>,
) -> Result<()> {
    let elements = THREADS as usize * (16 / size_of::<T>());
    let launch = Launch::new(grid((params.size as usize).div_ceil(elements))?, THREADS, 0);
    let name = if T::BF16 { "collective_sum_ranks_bf16" } else { "collective_sum_ranks_f32" };
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch(name, launch, stream, params) }
}
