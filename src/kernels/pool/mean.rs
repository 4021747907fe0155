//! Mean pooling: `out[N, D]` from `x[T, D]`, and `dx` from `dout`.

use half::bf16;

use super::instances::THREADS;
use super::{PackedSizes, grid};
use crate::device::{Buffer, Kernels, Launch, Ptr, RawStream, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{Rows, check_cu_seqlens, check_len, check_wide, check_workspace};

/// Columns of a block.
const COLUMNS: usize = 64;
/// The sums of 32 row groups; a float more a row keeps them in different banks.
const SHARED_BYTES: u32 = 32 * (COLUMNS as u32 + 1) * 4;

/// Arguments of the forward kernels, mirror of `PoolMeanForward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MeanForwardParams {
    /// `[images, width]`, written.
    pub out: Ptr<bf16>,
    /// Workspace of [`MeanPool::workspace_bytes`].
    pub partial: Ptr<f32>,
    /// Token rows, [`x_stride`](Self::x_stride) elements apart.
    pub x: Ptr<bf16>,
    /// `[images + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// Set where `cu_seqlens` is no list of images, see [`fault`](super::fault); may be null.
    pub error: Ptr<i32>,
    /// A multiple of 8.
    pub x_stride: i64,
    /// Token rows.
    pub tokens: i32,
    /// Image slots, at least 1.
    pub images: i32,
    /// Columns, a multiple of 8.
    pub width: i32,
    /// Tokens of every image that are left out.
    pub skip: i32,
}

/// Arguments of the backward kernel, mirror of `PoolMeanBackward`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MeanBackwardParams {
    /// Token rows, [`dx_stride`](Self::dx_stride) elements apart, all written.
    pub dx: Ptr<bf16>,
    /// `[images, width]`.
    pub dout: Ptr<bf16>,
    /// `[images + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// Set where `cu_seqlens` is no list of images, see [`fault`](super::fault); may be null.
    pub error: Ptr<i32>,
    /// A multiple of 8.
    pub dx_stride: i64,
    /// Token rows.
    pub tokens: i32,
    /// Image slots, at least 1.
    pub images: i32,
    /// Columns, a multiple of 8.
    pub width: i32,
    /// Tokens of every image that are left out.
    pub skip: i32,
}

/// Mean over the tokens of each image after the first `skip`; 0 where none remain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeanPool {
    /// The batch.
    pub sizes: PackedSizes,
    /// Columns D, a multiple of 8.
    pub width: usize,
}

impl MeanPool {
    /// Bytes of workspace of the forward pass.
    pub fn workspace_bytes(&self) -> usize {
        self.sizes.pieces() * self.width * size_of::<f32>()
    }

    fn check(&self) -> Result<()> {
        self.sizes.check()?;
        if self.width > 0 && self.width <= 1 << 20 && self.width.is_multiple_of(8) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "mean pooling has {} columns, expected a multiple of 8 to 2^20",
            self.width
        )))
    }

    /// Queues `out[N, D]` (written) from the rows `x[T, D]`.
    ///
    /// # Errors
    /// Sizes that do not fit together, rows that are not aligned, `cu_seqlens_host`, the host's copy of
    /// `cu_seqlens`, decreasing or overrunning, a launch that the device refuses.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        stream: &Stream,
        out: &Buffer<bf16>,
        x: Rows<'_, bf16>,
        cu_seqlens: &Buffer<i32>,
        cu_seqlens_host: &[i32],
        workspace: &Buffer<u8>,
    ) -> Result<()> {
        self.check()?;
        let PackedSizes { tokens, images, skip } = self.sizes;
        check_cu_seqlens(cu_seqlens_host, images, tokens)?;
        let params = MeanForwardParams {
            out: check_len("out", out, &[images, self.width])?,
            partial: check_workspace(workspace, self.workspace_bytes())?.cast(),
            x: x.check("x", tokens, self.width)?,
            cu_seqlens: check_len("cu_seqlens", cu_seqlens, &[images + 1])?,
            error: Ptr::null(),
            x_stride: x.stride as i64,
            tokens: tokens as i32,
            images: images as i32,
            width: self.width as i32,
            skip: skip as i32,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_mean_forward(stream.device().kernels(), stream.raw(), &params) }
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
        let PackedSizes { tokens, images, skip } = self.sizes;
        check_cu_seqlens(cu_seqlens_host, images, tokens)?;
        let params = MeanBackwardParams {
            dx: dx.check("dx", tokens, self.width)?,
            dout: check_wide("dout", dout, &[images, self.width])?,
            cu_seqlens: check_len("cu_seqlens", cu_seqlens, &[images + 1])?,
            error: Ptr::null(),
            dx_stride: dx.stride as i64,
            tokens: tokens as i32,
            images: images as i32,
            width: self.width as i32,
            skip: skip as i32,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_mean_backward(stream.device().kernels(), stream.raw(), &params) }
    }
}

/// Queues the forward kernels. Allocates nothing and waits for nothing.
///
/// # Errors
/// A grid that is too large, a launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned, and stays so until the kernels have run.
pub unsafe fn launch_mean_forward(
    kernels: &Kernels,
    stream: RawStream,
    params: &MeanForwardParams,
) -> Result<()> {
    let sizes = PackedSizes { tokens: params.tokens as usize, images: params.images as usize, skip: 0 };
    let slabs = (params.width as usize).div_ceil(COLUMNS);
    let main = Launch::new(grid(sizes.pieces() * slabs)?, THREADS, SHARED_BYTES);
    let combine = Launch::new(grid(sizes.images)?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch("pool_mean_forward_bf16", main, stream, params)?;
        kernels.launch("pool_mean_combine_bf16", combine, stream, params)
    }
}

/// Queues the backward kernel. Allocates nothing and waits for nothing.
///
/// # Errors
/// As for [`launch_mean_forward`].
///
/// # Safety
/// As for [`launch_mean_forward`].
pub unsafe fn launch_mean_backward(
    kernels: &Kernels,
    stream: RawStream,
    params: &MeanBackwardParams,
) -> Result<()> {
    let sizes = PackedSizes { tokens: params.tokens as usize, images: params.images as usize, skip: 0 };
    let slabs = (params.width as usize).div_ceil(COLUMNS);
    // One piece more: the rows that belong to no image.
    let launch = Launch::new(grid((sizes.pieces() + 1) * slabs)?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("pool_mean_backward_bf16", launch, stream, params) }
}
