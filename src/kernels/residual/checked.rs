//! Checked launches of the residual connection.

use half::bf16;

use super::raw::{
    BackwardParams, ForwardParams, SLICE_ROWS, backward_workspace_bytes, launch_backward, launch_forward,
};
use crate::device::{Buffer, Ptr, Stream};
use crate::error::{Error, Result};
use crate::kernels::gemm::raw::{SumRowsParams, sum_rows};
use crate::kernels::operand::{
    Rows, check_cu_seqlens, check_len, check_some, check_wide_some, check_workspace,
};

/// Where the images of a batch lie.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    /// `[N + 1]`.
    pub cu_seqlens: &'a Buffer<i32>,
    /// The host's copy of it.
    pub cu_seqlens_host: &'a [i32],
}

impl Packed<'_> {
    /// The address of `cu_seqlens[N]`, the number of rows that hold anything.
    pub(crate) fn live(&self, tokens: usize) -> Result<Ptr<i32>> {
        let images = self.cu_seqlens_host.len().saturating_sub(1);
        check_cu_seqlens(self.cu_seqlens_host, images, tokens)?;
        Ok(check_len("cu_seqlens", self.cu_seqlens, &[images + 1])?.offset(images))
    }
}

/// What is added to the residual stream: `keep · scale ⊙ rows`.
#[derive(Clone, Copy)]
pub struct Branch<'a> {
    /// `[T, D]`.
    pub rows: Rows<'a, bf16>,
    /// LayerScale, `[D]`; none is 1.
    pub scale: Option<&'a Buffer<f32>>,
    /// Stochastic depth: `[branches, T]`, and which of its branches this is. None is 1.
    pub keep: Option<(&'a Buffer<f32>, usize)>,
}

impl Branch<'_> {
    /// Addresses of scale and keep.
    pub(crate) fn factors(&self, tokens: usize, width: usize) -> Result<(Ptr<f32>, Ptr<f32>)> {
        let scale = check_wide_some("scale", self.scale, &[width])?;
        let Some((keep, branch)) = self.keep else { return Ok((scale, Ptr::null())) };
        let end = branch.checked_add(1).and_then(|rows| rows.checked_mul(tokens));
        match end.filter(|&end| end <= keep.len()) {
            Some(end) => Ok((scale, keep.ptr().offset(end - tokens))),
            None => Err(Error::usage(format!(
                "keep has {} elements, too few for branch {branch} of {tokens} tokens; give a buffer of \
                 branches x tokens",
                keep.len()
            ))),
        }
    }
}

/// Gradients of a branch.
#[derive(Clone, Copy)]
pub struct BranchGrad<'a> {
    /// `[T, D]`, all rows written.
    pub dbranch: Rows<'a, bf16>,
    /// `[D]`, written or added to; none where it is not wanted.
    pub dscale: Option<&'a Buffer<f32>>,
}

/// `out = x + keep · scale ⊙ branch` of the rows of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residual {
    /// Token rows T.
    pub tokens: usize,
    /// Columns D, a multiple of 8.
    pub width: usize,
}

impl Residual {
    fn check(&self) -> Result<()> {
        let Self { tokens, width } = *self;
        let vectors = tokens.checked_mul(width / 8).filter(|&n| n > 0 && n < 1 << 31);
        // Slices are blocks along y, of which there are fewer than 2^16.
        if vectors.is_some() && width.is_multiple_of(8) && tokens.div_ceil(SLICE_ROWS) < 1 << 16 {
            return Ok(());
        }
        Err(Error::usage(format!(
            "a residual connection has {tokens} rows of {width} elements, expected 1 to 2^24 - 256 rows of a \
             multiple of 8, and at most 2^34 elements"
        )))
    }

    /// Bytes of workspace of the backward pass.
    pub fn backward_workspace_bytes(&self) -> usize {
        backward_workspace_bytes(self.tokens, self.width)
    }

    /// Queues `out[T, D]` (written); it may be `x`.
    ///
    /// # Errors
    /// Sizes that do not fit together, rows that are not aligned, a `cu_seqlens` that decreases or overruns, a
    /// launch that the device refuses.
    pub fn forward(
        &self,
        stream: &Stream,
        packed: Packed<'_>,
        out: Rows<'_, bf16>,
        x: Rows<'_, bf16>,
        branch: Branch<'_>,
    ) -> Result<()> {
        self.check()?;
        let Self { tokens, width } = *self;
        let (scale, keep) = branch.factors(tokens, width)?;
        let params = ForwardParams {
            out: out.check("out", tokens, width)?,
            x: x.check("x", tokens, width)?,
            branch: branch.rows.check("branch", tokens, width)?,
            scale,
            keep,
            live: packed.live(tokens)?,
            out_stride: out.stride as i64,
            x_stride: x.stride as i64,
            branch_stride: branch.rows.stride as i64,
            tokens: tokens as i32,
            width: width as i32,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_forward(stream.device().kernels(), stream.raw(), &params) }
    }

    /// Queues the gradients of the branch from `dout[T, D]`; `dbranch` may be `dout`. `accumulate` is one flag:
    /// whether `dscale` is added to; none: it is written. The workspace has
    /// [`backward_workspace_bytes`](Self::backward_workspace_bytes).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        stream: &Stream,
        packed: Packed<'_>,
        dout: Rows<'_, bf16>,
        branch: Branch<'_>,
        grad: BranchGrad<'_>,
        accumulate: Option<&Buffer<i32>>,
        workspace: &Buffer<u8>,
    ) -> Result<()> {
        self.check()?;
        let Self { tokens, width } = *self;
        let (scale, keep) = branch.factors(tokens, width)?;
        let dscale = check_some("dscale", grad.dscale, &[width])?;
        let accumulate = check_some("accumulate", accumulate, &[1])?;
        let partial: Ptr<f32> = check_workspace(workspace, self.backward_workspace_bytes())?.cast();
        let params = BackwardParams {
            dbranch: grad.dbranch.check("dbranch", tokens, width)?,
            dscale: if dscale.is_null() { Ptr::null() } else { partial },
            dout: dout.check("dout", tokens, width)?,
            branch: branch.rows.check("branch", tokens, width)?,
            scale,
            keep,
            live: packed.live(tokens)?,
            dbranch_stride: grad.dbranch.stride as i64,
            dout_stride: dout.stride as i64,
            branch_stride: branch.rows.stride as i64,
            tokens: tokens as i32,
            width: width as i32,
            rows: SLICE_ROWS as i32,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_backward(stream.device().kernels(), stream.raw(), &params)? };
        if dscale.is_null() {
            return Ok(());
        }
        let sums = SumRowsParams {
            rows: partial,
            out: dscale,
            accumulate,
            count: tokens.div_ceil(SLICE_ROWS) as i32,
            cols: width as i32,
        };
        // SAFETY: as above.
        unsafe { sum_rows(stream.device().kernels(), stream.raw(), &sums) }
    }
}
