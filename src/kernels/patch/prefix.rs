//! Prefix tokens (cls, registers) in the first rows of every image.

use half::bf16;

use super::instances::THREADS;
use crate::device::{Buffer, Kernels, Launch, Ptr, RawStream, Stream};
use crate::error::Result;
use crate::kernels::gemm::raw::{SumRowsParams, sum_rows};
use crate::kernels::operand::{
    Rows, check_cu_seqlens, check_extents, check_len, check_some, check_width, check_workspace, grid,
};

/// Images and columns of a block of the gradient.
const BLOCK: (usize, usize) = (128, 64);
/// The sums of 32 row groups; a float more a row keeps them in different banks.
const SHARED_BYTES: u32 = 32 * (BLOCK.1 as u32 + 1) * 4;

/// Arguments of the kernels, mirror of `PatchPrefix`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PrefixParams {
    /// Token rows, or their gradient: written at the prefix rows, elsewhere left as they are.
    pub x: Ptr<bf16>,
    /// `[prefix, width]`; not read by the gradient.
    pub tokens: Ptr<f32>,
    /// For the gradient: workspace of [`prefix_workspace_bytes`], or null where only the rows are to become zero.
    pub partial: Ptr<f32>,
    /// `[images + 1]`.
    pub cu_seqlens: Ptr<i32>,
    /// A multiple of 8.
    pub x_stride: i64,
    /// Token rows.
    pub rows: i32,
    /// Image slots, at least 1.
    pub images: i32,
    /// Prefix tokens of an image, at least 1.
    pub prefix: i32,
    /// Columns, a multiple of 8.
    pub width: i32,
}

/// Bytes of workspace of the gradient.
pub fn prefix_workspace_bytes(images: usize, prefix: usize, width: usize) -> usize {
    images.div_ceil(BLOCK.0) * prefix * width * size_of::<f32>()
}

/// Prefix tokens of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Token rows T.
    pub rows: usize,
    /// Image slots N.
    pub images: usize,
    /// Prefix tokens of an image; one that is shorter has only its first ones.
    pub prefix: usize,
    /// Columns D, a multiple of 8.
    pub width: usize,
}

impl Prefix {
    /// Bytes of workspace of [`grad`](Self::grad).
    pub fn workspace_bytes(&self) -> usize {
        prefix_workspace_bytes(self.images, self.prefix, self.width)
    }

    fn params(
        &self,
        x: Rows<'_, bf16>,
        cu_seqlens: &Buffer<i32>,
        cu_seqlens_host: &[i32],
    ) -> Result<PrefixParams> {
        let Self { rows, images, prefix, width } = *self;
        check_extents("prefix tokens", &[rows, images, prefix])?;
        check_width("prefix tokens", width, 8)?;
        check_cu_seqlens(cu_seqlens_host, images, rows)?;
        Ok(PrefixParams {
            x: x.check("x", rows, width)?,
            tokens: Ptr::null(),
            partial: Ptr::null(),
            cu_seqlens: check_len("cu_seqlens", cu_seqlens, &[images + 1])?,
            x_stride: x.stride as i64,
            rows: rows as i32,
            images: images as i32,
            prefix: prefix as i32,
            width: width as i32,
        })
    }

    /// Queues `tokens[prefix, D]` over the first rows of every image in `x[T, D]`; all other rows stay.
    ///
    /// # Errors
    /// Sizes that do not fit together, rows that are not aligned, `cu_seqlens_host`, the host's copy of
    /// `cu_seqlens`, decreasing or overrunning, a launch that the device refuses.
    pub fn write(
        &self,
        stream: &Stream,
        x: Rows<'_, bf16>,
        tokens: &Buffer<f32>,
        cu_seqlens: &Buffer<i32>,
        cu_seqlens_host: &[i32],
    ) -> Result<()> {
        let mut params = self.params(x, cu_seqlens, cu_seqlens_host)?;
        params.tokens = check_len("tokens", tokens, &[self.prefix, self.width])?;
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_prefix_write(stream.device().kernels(), stream.raw(), &params) }
    }

    /// Queues `dtokens[prefix, D]` (added to where `accumulate` holds a number other than 0, else written): the
    /// gradient at the prefix rows of `dx[T, D]`, summed over the images; then those rows of `dx` become zero.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    #[allow(clippy::too_many_arguments)]
    pub fn grad(
        &self,
        stream: &Stream,
        dx: Rows<'_, bf16>,
        dtokens: Option<&Buffer<f32>>,
        accumulate: Option<&Buffer<i32>>,
        cu_seqlens: &Buffer<i32>,
        cu_seqlens_host: &[i32],
        workspace: &Buffer<u8>,
    ) -> Result<()> {
        let mut params = self.params(dx, cu_seqlens, cu_seqlens_host)?;
        if dtokens.is_some() {
            params.partial = check_workspace(workspace, self.workspace_bytes())?.cast();
        }
        let dtokens = check_some("dtokens", dtokens, &[self.prefix, self.width])?;
        let accumulate = check_some("accumulate", accumulate, &[1])?;
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_prefix_grad(stream.device().kernels(), stream.raw(), &params, dtokens, accumulate) }
    }
}

/// Queues the kernel that writes prefix tokens. Allocates nothing and waits for nothing.
///
/// # Errors
/// A grid that is too large, a launch that the device refuses.
///
/// # Safety
/// Every address is valid for what its field says, 16-byte aligned (`cu_seqlens` 4-byte), and stays so until the
/// kernel has run.
pub unsafe fn launch_prefix_write(kernels: &Kernels, stream: RawStream, params: &PrefixParams) -> Result<()> {
    let pieces = params.images as usize * params.prefix as usize * (params.width as usize / 8);
    let launch = Launch::new(grid(pieces.div_ceil(THREADS as usize))?, THREADS, 0);
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernel.
    unsafe { kernels.launch("patch_prefix_write_bf16", launch, stream, params) }
}

/// Queues the kernels of the gradient: `dtokens[prefix, width]`, null where [`PrefixParams::partial`] is, is
/// added to where `accumulate` is not null and leads to a number other than 0. Allocates nothing and waits for
/// nothing.
///
/// # Errors
/// As for [`launch_prefix_write`].
///
/// # Safety
/// As for [`launch_prefix_write`].
pub unsafe fn launch_prefix_grad(
    kernels: &Kernels,
    stream: RawStream,
    params: &PrefixParams,
    dtokens: Ptr<f32>,
    accumulate: Ptr<i32>,
) -> Result<()> {
    let slices = (params.images as u32).div_ceil(BLOCK.0 as u32);
    let blocks = [(params.width as u32).div_ceil(BLOCK.1 as u32), params.prefix as u32, slices];
    let sums = SumRowsParams {
        rows: params.partial,
        out: dtokens,
        accumulate,
        count: slices as i32,
        cols: params.prefix * params.width,
    };
    // SAFETY: the caller answers for the addresses; the parameters are those of the kernels.
    unsafe {
        kernels.launch(
            "patch_prefix_grad_bf16",
            Launch::new(blocks, THREADS, SHARED_BYTES),
            stream,
            params,
        )?;
        if dtokens.is_null() { Ok(()) } else { sum_rows(kernels, stream, &sums) }
    }
}
