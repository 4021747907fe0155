//! Patches as the batch has them become rows of bf16.

use half::bf16;

use super::instances::{THREADS, normalise_name};
use crate::device::{Buffer, Kernels, Launch, Ptr, RawStream, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{Rows, check_cu_seqlens, check_extents, check_len, grid};

/// Rows and columns of a block.
const BLOCK: (usize, usize) = (64, 128);

/// Arguments of the kernels, mirror of `PatchNormalise`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct NormaliseParams {
    /// Rows of [`out_stride`](Self::out_stride) elements, all written.
    pub out: Ptr<bf16>,
    /// `[tokens, width]`, u8 or f32.
    pub patches: Ptr<u8>,
    /// `[channels, 2]`, see [`factors`]; not read for f32.
    pub factors: Ptr<f32>,
    /// `[tokens, 2]`.
    pub positions: Ptr<u16>,
    /// The number of live rows, last entry of `cu_seqlens`; null: all.
    pub live: Ptr<i32>,
    /// A multiple of 8, at least `width`: [`row_stride`] or more. The columns from `width` on become zeros.
    pub out_stride: i64,
    /// Token rows.
    pub tokens: i32,
    /// Channels times plane.
    pub width: i32,
    /// Pixels of a channel.
    pub plane: i32,
}

/// Elements from row to row of the normalised patches: the patch's width, rounded up to whole 16 bytes.
///
/// The matrix product over such rows runs over all of the stride, so the embedding's weight has rows of the same
/// stride. What lies in the columns after the width is multiplied by zeros, and gets a gradient of zeros: a
/// weight, its gradient and its optimiser state that are laid out with this stride and begin as zeros there
/// stay so. It must be finite.
pub fn row_stride(patch_dim: usize) -> usize {
    patch_dim.next_multiple_of(8)
}

/// `[channels, 2]`: the factor `1/(255 std)` and the summand `−mean/std` of every channel. `mean` and `std` have
/// one entry a channel, or one for all.
///
/// # Errors
/// Another number of entries; a standard deviation that is not above 0.
pub fn factors(mean: &[f32], std: &[f32], channels: usize) -> Result<Vec<f32>> {
    for (name, values) in [("mean", mean), ("std", std)] {
        if values.len() != 1 && values.len() != channels {
            return Err(Error::usage(format!(
                "data.{name} has {} entries, expected 1 or {channels}, one for each channel",
                values.len()
            )));
        }
    }
    if let Some(bad) = std.iter().find(|std| std.is_nan() || **std <= 0.0) {
        return Err(Error::usage(format!("data.std has an entry {bad}, expected numbers above 0")));
    }
    let entry = |values: &[f32], c: usize| f64::from(values[if values.len() == 1 { 0 } else { c }]);
    Ok((0..channels)
        .flat_map(|c| {
            let (mean, std) = (entry(mean, c), entry(std, c));
            [(1.0 / (255.0 * std)) as f32, (-mean / std) as f32]
        })
        .collect())
}

/// The patches of a checked launch, `[tokens, channels·plane]`.
#[derive(Clone, Copy)]
pub enum Pixels<'a> {
    /// Pixel values with the [`factors`] of their channels.
    U8(&'a Buffer<u8>, &'a Buffer<f32>),
    /// Values that are used as they are.
    F32(&'a Buffer<f32>),
}

/// Patches of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Normalise {
    /// Token rows T.
    pub tokens: usize,
    /// Image slots N.
    pub images: usize,
    /// Channels of a patch.
    pub channels: usize,
    /// Pixels of a channel: P².
    pub plane: usize,
}

impl Normalise {
    /// Queues `out` (all rows, all of the stride written) from `patches`; rows of prefix tokens and rows from
    /// `cu_seqlens[N]` on become zeros.
    ///
    /// # Errors
    /// Sizes that do not fit together, rows that are not aligned, `cu_seqlens_host`, the host's copy of
    /// `cu_seqlens`, decreasing or overrunning, a launch that the device refuses.
    #[allow(clippy::too_many_arguments)]
    pub fn launch(
        &self,
        stream: &Stream,
        out: Rows<'_, bf16>,
        patches: Pixels<'_>,
        positions: &Buffer<u16>,
        cu_seqlens: &Buffer<i32>,
        cu_seqlens_host: &[i32],
    ) -> Result<()> {
        let Self { tokens, images, channels, plane } = *self;
        check_extents("patches", &[tokens, images, channels, plane])?;
        let width = channels * plane;
        check_extents("patches", &[width])?;
        check_cu_seqlens(cu_seqlens_host, images, tokens)?;
        let (source, factors, pixels) = match patches {
            Pixels::U8(pixels, factors) => (
                check_len("patches", pixels, &[tokens, width])?,
                check_len("factors", factors, &[channels, 2])?,
                true,
            ),
            Pixels::F32(values) => {
                (check_len("patches", values, &[tokens, width])?.cast(), Ptr::null(), false)
            }
        };
        let params = NormaliseParams {
            // Every element to the end of a row is written.
            out: out.check("out", tokens, out.stride.max(width))?,
            patches: source,
            factors,
            positions: check_len("positions", positions, &[tokens, 2])?,
            live: check_len("cu_seqlens", cu_seqlens, &[images + 1])?.offset(images),
            out_stride: out.stride as i64,
            tokens: tokens as i32,
            width: width as i32,
            plane: plane as i32,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_normalise(stream.device().kernels(), stream.raw(), &params, pixels) }
    }
}

/// Bytes of the widest load for which rows of `width` elements are aligned.
fn load_bytes(u8_pixels: bool, width: usize) -> usize {
    let candidates: &[usize] = if u8_pixels { &[8, 4] } else { &[16] };
    let bytes = if u8_pixels { width } else { 4 * width };
    candidates.iter().copied().find(|&n| bytes.is_multiple_of(n)).unwrap_or(if u8_pixels { 1 } else { 4 })
}

/// Queues the kernel for u8 patches, or for f32. Allocates nothing and waits for nothing.
///
/// # Errors
/// A grid that is too large, a launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned (`positions` and `live` 4-byte), and stays so
/// until the kernel has run.
pub unsafe fn launch_normalise(
    kernels: &Kernels,
    stream: RawStream,
    params: &NormaliseParams,
    u8_pixels: bool,
) -> Result<()> {
    let blocks = (params.tokens as usize).div_ceil(BLOCK.0) * (params.out_stride as usize).div_ceil(BLOCK.1);
    let name = normalise_name(u8_pixels, load_bytes(u8_pixels, params.width as usize));
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch(&name, Launch::new(grid(blocks)?, THREADS, 0), stream, params) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_as_wide_as_rows_allow() {
        assert_eq!([768, 588, 196, 147, 3].map(|w| load_bytes(true, w)), [8, 4, 4, 1, 1]);
        assert_eq!([768, 588, 147, 3].map(|w| load_bytes(false, w)), [16, 16, 4, 4]);
    }

    #[test]
    fn factors_are_those_of_the_formula() {
        assert_eq!(factors(&[0.5], &[0.5], 2).unwrap(), [1.0 / 127.5, -1.0, 1.0 / 127.5, -1.0]);
        assert!(factors(&[0.5; 2], &[0.5], 3).unwrap_err().to_string().contains("data.mean has 2 entries"));
        assert!(factors(&[0.5], &[0.0], 3).unwrap_err().to_string().contains("data.std"));
        assert_eq!([768, 588, 147].map(row_stride), [768, 592, 152]);
    }
}
