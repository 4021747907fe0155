//! Token gather: one token of every image, such as its cls token.

use half::bf16;

use super::instances::THREADS;
use super::{PackedSizes, grid};
use crate::device::{Buffer, Kernels, Launch, Ptr, RawStream, Stream};
use crate::error::Result;
use crate::kernels::operand::{Rows, check_cu_seqlens, check_len, check_wide, check_width};

/// Columns of a block of the backward kernel.
const COLUMNS: usize = 64;

/// Arguments of the kernels, mirror of `PoolGather`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GatherParams {
    /// Written: `[images, width]` forward, all token rows of `stride` elements backward.
    pub out: Ptr<bf16>,
    /// Token rows of `stride` elements forward, `[images, width]` backward.
    pub x: Ptr<bf16>,
    /// `[images + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// Set where `cu_seqlens` is no list of images, see [`fault`](super::fault); may be null.
    pub error: Ptr<i32>,
    /// Elements from token row to token row, a multiple of 8.
    pub stride: i64,
    /// Token rows.
    pub tokens: i32,
    /// Image slots, at least 1.
    pub images: i32,
    /// Columns, a multiple of 8.
    pub width: i32,
    /// Number of the token within its image.
    pub offset: i32,
}

/// Token `sizes.skip` of every image: `out[N, D]`, zeros where an image has no such token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenGather {
    /// The batch. The token that is gathered is the first one after those that are left out.
    pub sizes: PackedSizes,
    /// Columns D, a multiple of 8.
    pub width: usize,
}

impl TokenGather {
    fn params(
        &self,
        cu_seqlens: &Buffer<i32>,
        cu_seqlens_host: &[i32],
        [out, x]: [Ptr<bf16>; 2],
        stride: usize,
    ) -> Result<GatherParams> {
        let PackedSizes { tokens, images, skip } = self.sizes;
        check_cu_seqlens(cu_seqlens_host, images, tokens)?;
        Ok(GatherParams {
            out,
            x,
            cu_seqlens: check_len("cu_seqlens", cu_seqlens, &[images + 1])?,
            error: Ptr::null(),
            stride: stride as i64,
            tokens: tokens as i32,
            images: images as i32,
            width: self.width as i32,
            offset: skip as i32,
        })
    }

    fn check(&self) -> Result<()> {
        self.sizes.check()?;
        check_width("token gather", self.width, 8)
    }

    /// Queues `out[N, D]` (written) from the rows `x[T, D]`.
    ///
    /// # Errors
    /// Sizes that do not fit together, rows that are not aligned, `cu_seqlens_host`, the host's copy of
    /// `cu_seqlens`, decreasing or overrunning, a launch that the device refuses.
    pub fn forward(
        &self,
        stream: &Stream,
        out: &Buffer<bf16>,
        x: Rows<'_, bf16>,
        cu_seqlens: &Buffer<i32>,
        cu_seqlens_host: &[i32],
    ) -> Result<()> {
        self.check()?;
        let out = check_wide("out", out, &[self.sizes.images, self.width])?;
        let rows = x.check("x", self.sizes.tokens, self.width)?;
        let params = self.params(cu_seqlens, cu_seqlens_host, [out, rows], x.stride)?;
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_gather_forward(stream.device().kernels(), stream.raw(), &params) }
    }

    /// Queues `dx[T, D]` (all rows written) from `dout[N, D]`.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn backward(
        &self,
        stream: &Stream,
        dx: Rows<'_, bf16>,
        dout: &Buffer<bf16>,
        cu_seqlens: &Buffer<i32>,
        cu_seqlens_host: &[i32],
    ) -> Result<()> {
        self.check()?;
        let dout = check_wide("dout", dout, &[self.sizes.images, self.width])?;
        let rows = dx.check("dx", self.sizes.tokens, self.width)?;
        let params = self.params(cu_seqlens, cu_seqlens_host, [rows, dout], dx.stride)?;
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_gather_backward(stream.device().kernels(), stream.raw(), &params) }
    }
}

/// Queues the forward kernel. Allocates nothing and waits for nothing.
///
/// # Errors
/// A grid that is too large, a launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned (`cu_seqlens` 4-byte), and stays so until the
/// kernel has run.
pub unsafe fn launch_gather_forward(
    kernels: &Kernels,
    stream: RawStream,
    params: &GatherParams,
) -> Result<()> {
    let pieces = params.images as usize * (params.width as usize / 8);
    let launch = Launch::new(grid(pieces.div_ceil(THREADS as usize))?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("pool_gather_forward_bf16", launch, stream, params) }
}

/// Queues the backward kernel. Allocates nothing and waits for nothing.
///
/// # Errors
/// As for [`launch_gather_forward`].
///
/// # Safety
/// As for [`launch_gather_forward`].
pub unsafe fn launch_gather_backward(
    kernels: &Kernels,
    stream: RawStream,
    params: &GatherParams,
) -> Result<()> {
    let sizes = PackedSizes { tokens: params.tokens as usize, images: params.images as usize, skip: 0 };
    let slabs = (params.width as usize).div_ceil(COLUMNS);
    // One piece more: the rows that belong to no image.
    let launch = Launch::new(grid((sizes.pieces() + 1) * slabs)?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("pool_gather_backward_bf16", launch, stream, params) }
}
