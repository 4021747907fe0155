//! The factors of stochastic depth, drawn on the device: those that the CPU device draws.

use bytemuck::{Pod, Zeroable};

use super::checked::Packed;
use super::instances::KEEP_THREADS;
use crate::device::{Buffer, Kernels, Launch, Ptr, RawStream, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::check_len;

/// The rate of a residual branch as the kernel takes it, in device memory: a schedule may change it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct DropPathRate {
    /// An image is left out where the 24 bits of its number are below this.
    pub threshold: u32,
    /// Factor of the images that stay, `1 / (1 − rate)`.
    pub kept: f32,
}

impl DropPathRate {
    /// Of a probability in `0..1`. A number `m / 2^24` is below the rate where `m` is below `rate · 2^24`
    /// rounded up, so integers decide as [`uniform`](crate::rng::Stream::uniform) does.
    pub fn new(rate: f64) -> Self {
        Self { threshold: (rate * f64::from(1 << 24)).ceil() as u32, kept: (1.0 / (1.0 - rate)) as f32 }
    }
}

/// Arguments of the kernel, mirror of `DropPathKeep`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KeepParams {
    /// `[branches, tokens]`, all written: the factor of the token's image, 0 where there is no image.
    pub keep: Ptr<f32>,
    /// `[branches]`, 8-byte aligned.
    pub rates: Ptr<DropPathRate>,
    /// One number: the seed of the run.
    pub seed: Ptr<u64>,
    /// `[images]`: epoch in which the sample was drawn.
    pub epochs: Ptr<u64>,
    /// `[images]`.
    pub sample_ids: Ptr<u64>,
    /// `[images + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// Token rows.
    pub tokens: i32,
    /// Image slots.
    pub images: i32,
    /// Number of the first branch, the key of its random numbers.
    pub first_branch: i32,
}

/// Queues the factors of `branches` branches. Allocates nothing and waits for nothing.
///
/// # Errors
/// A launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, aligned to its type, and stays so until the kernel has run.
pub unsafe fn launch_keep(
    kernels: &Kernels,
    stream: RawStream,
    params: &KeepParams,
    branches: u32,
) -> Result<()> {
    // One image more: the rows that belong to none.
    let launch = Launch::new([params.images as u32 + 1, branches, 1], KEEP_THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("drop_path_keep_f32", launch, stream, params) }
}

/// Stochastic depth of all residual branches of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropPath {
    /// Token rows T.
    pub tokens: usize,
    /// Residual branches, numbered from 0.
    pub branches: usize,
}

/// What the random numbers of a step are keyed by.
#[derive(Clone, Copy)]
pub struct DropPathKeys<'a> {
    /// One number: the seed of the run.
    pub seed: &'a Buffer<u64>,
    /// `[N]`: epoch in which the sample was drawn.
    pub epochs: &'a Buffer<u64>,
    /// `[N]`.
    pub sample_ids: &'a Buffer<u64>,
}

impl DropPath {
    /// Queues `keep[branches, T]` (written) from `rates[branches]`.
    ///
    /// # Errors
    /// Buffers of another size, a `cu_seqlens` that decreases or overruns, a launch that the device refuses.
    pub fn keep(
        &self,
        stream: &Stream,
        packed: Packed<'_>,
        keep: &Buffer<f32>,
        rates: &Buffer<DropPathRate>,
        keys: DropPathKeys<'_>,
    ) -> Result<()> {
        let Self { tokens, branches } = *self;
        if tokens == 0 || tokens > 1 << 30 || branches == 0 || branches >= 1 << 16 {
            return Err(Error::usage(format!(
                "stochastic depth has {branches} branches of {tokens} tokens, expected 1 to 65535 branches and \
                 1 to 2^30 tokens"
            )));
        }
        packed.live(tokens)?;
        let images = packed.cu_seqlens_host.len() - 1;
        let params = KeepParams {
            keep: check_len("keep", keep, &[branches, tokens])?,
            rates: check_len("rates", rates, &[branches])?,
            seed: check_len("seed", keys.seed, &[1])?,
            epochs: check_len("epochs", keys.epochs, &[images])?,
            sample_ids: check_len("sample_ids", keys.sample_ids, &[images])?,
            cu_seqlens: packed.cu_seqlens.ptr(),
            tokens: tokens as i32,
            images: images as i32,
            first_branch: 0,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_keep(stream.device().kernels(), stream.raw(), &params, branches as u32) }
    }
}

#[cfg(test)]
mod tests {
    use super::DropPathRate;

    #[test]
    fn thresholds_count_the_numbers_below_a_rate() {
        let threshold = |rate| DropPathRate::new(rate).threshold;
        let of = |m: u32| f64::from(m) / f64::from(1 << 24);
        assert_eq!(threshold(0.0), 0);
        assert_eq!(threshold(0.5), 1 << 23);
        for rate in [0.1, 0.3, 1.0 / 3.0, of(77), of(77) + 1e-12, 0.999_999_9] {
            let first = threshold(rate);
            assert!(of(first - 1) < rate && of(first) >= rate, "{rate}");
        }
        assert_eq!(DropPathRate::new(0.25).kept, (1.0 / 0.75) as f32);
    }
}
