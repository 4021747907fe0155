//! Checked launches of the norms.

use half::bf16;

use super::MAX_WIDTH;
use super::raw::{
    BackwardParams, ForwardParams, SumsParams, backward_workspace_bytes, launch_backward, launch_forward,
    launch_sums, partial_rows,
};
use crate::device::{Buffer, Device, Ptr, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{Rows, check_aligned, check_len, check_some, check_wide_some, check_workspace};
use crate::kernels::residual::{Branch, BranchGrad, Packed};
use crate::ops::NormKind;

/// Bytes of the statistics of a row, which kernels read at a time.
const STATS_BYTES: u64 = 8;

/// LayerNorm or RMSNorm of the rows of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Token rows T.
    pub tokens: usize,
    /// Columns D, a multiple of 8 up to [`MAX_WIDTH`].
    pub width: usize,
    /// Which norm.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f64,
}

/// Operands of the forward pass.
#[derive(Clone, Copy)]
pub struct NormForward<'a> {
    /// `[T, D]`.
    pub x: Rows<'a, bf16>,
    /// The residual connection before the norm, and `x_out[T, D]` (written), its result; may be `x`.
    pub residual: Option<(Branch<'a>, Rows<'a, bf16>)>,
    /// `[D]`; none is 1.
    pub gain: Option<&'a Buffer<f32>>,
    /// `[D]`; none is 0.
    pub bias: Option<&'a Buffer<f32>>,
    /// `[T, D]`, written.
    pub y: Rows<'a, bf16>,
    /// `[T, 2]`, written: mean and reciprocal standard deviation.
    pub stats: &'a Buffer<f32>,
}

/// Operands of the backward pass.
#[derive(Clone, Copy)]
pub struct NormBackward<'a> {
    /// Gradient of `y`, `[T, D]`.
    pub dy: Rows<'a, bf16>,
    /// What everything else that reads `x` adds to its gradient, `[T, D]`.
    pub dresidual: Option<Rows<'a, bf16>>,
    /// What was normalised, `[T, D]`: `x_out` where there was a branch.
    pub x: Rows<'a, bf16>,
    /// As the forward pass wrote it.
    pub stats: &'a Buffer<f32>,
    /// As in the forward pass.
    pub gain: Option<&'a Buffer<f32>>,
    /// The residual connection before the norm, and its gradients.
    pub residual: Option<(Branch<'a>, BranchGrad<'a>)>,
    /// `[T, D]`, written; may be `dy` or `dresidual`.
    pub dx: Rows<'a, bf16>,
    /// `[D]`, written or added to.
    pub dgain: Option<&'a Buffer<f32>>,
    /// `[D]`, written or added to.
    pub dbias: Option<&'a Buffer<f32>>,
    /// One flag: whether gradients of parameters are added to. None: they are written.
    pub accumulate: Option<&'a Buffer<i32>>,
}

impl Norm {
    /// Verifies the sizes, as every launch does.
    ///
    /// # Errors
    /// A width without a kernel, no rows, or more than 2^30.
    pub fn check(&self) -> Result<()> {
        if self.width == 0 || self.width > MAX_WIDTH || !self.width.is_multiple_of(8) {
            return Err(Error::usage(format!(
                "a norm has rows of {} elements, expected a multiple of 8 to {MAX_WIDTH}",
                self.width
            )));
        }
        if self.tokens == 0 || self.tokens > 1 << 30 {
            return Err(Error::usage(format!("a norm has {} rows, expected 1 to 2^30", self.tokens)));
        }
        Ok(())
    }

    fn layer_norm(&self) -> i32 {
        i32::from(self.kind == NormKind::LayerNorm)
    }

    /// Bytes of workspace of the backward pass on a device, whichever gradients are wanted.
    pub fn backward_workspace_bytes(&self, device: &Device) -> usize {
        backward_workspace_bytes(self.tokens, self.width, 3, device.info().multiprocessors)
    }

    /// Queues `y`, `stats` and, with a residual connection, `x_out`.
    ///
    /// # Errors
    /// A width without a kernel, buffers of another size, rows that are not aligned, a `cu_seqlens` that
    /// decreases or overruns, a launch that the device refuses.
    pub fn forward(&self, stream: &Stream, packed: Packed<'_>, args: &NormForward<'_>) -> Result<()> {
        self.check()?;
        self.queue_forward(stream, packed.live(self.tokens)?, args)
    }

    /// The same where only the device knows the rows that hold anything: one number, of which every value is taken; none
    /// is all rows.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn forward_live(
        &self,
        stream: &Stream,
        live: Option<&Buffer<i32>>,
        args: &NormForward<'_>,
    ) -> Result<()> {
        self.check()?;
        self.queue_forward(stream, check_some("live", live, &[1])?, args)
    }

    fn queue_forward(&self, stream: &Stream, live: Ptr<i32>, args: &NormForward<'_>) -> Result<()> {
        let Self { tokens, width, .. } = *self;
        let mut params = ForwardParams {
            y: args.y.check("y", tokens, width)?,
            x_out: Ptr::null(),
            stats: check_aligned("stats", check_len("stats", args.stats, &[tokens, 2])?, STATS_BYTES)?,
            x: args.x.check("x", tokens, width)?,
            branch: Ptr::null(),
            scale: Ptr::null(),
            keep: Ptr::null(),
            gain: check_wide_some("gain", args.gain, &[width])?,
            bias: check_wide_some("bias", args.bias, &[width])?,
            live,
            y_stride: args.y.stride as i64,
            x_out_stride: 0,
            x_stride: args.x.stride as i64,
            branch_stride: 0,
            tokens: tokens as i32,
            width: width as i32,
            layer_norm: self.layer_norm(),
            eps: self.eps as f32,
        };
        if let Some((branch, x_out)) = &args.residual {
            params.x_out = x_out.check("x_out", tokens, width)?;
            params.x_out_stride = x_out.stride as i64;
            params.branch = branch.rows.check("branch", tokens, width)?;
            params.branch_stride = branch.rows.stride as i64;
            (params.scale, params.keep) = branch.factors(tokens, width)?;
        }
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_forward(stream.device().kernels(), stream.raw(), &params) }
    }

    /// Queues the gradients; the workspace has [`backward_workspace_bytes`](Self::backward_workspace_bytes).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn backward(
        &self,
        stream: &Stream,
        packed: Packed<'_>,
        args: &NormBackward<'_>,
        workspace: &Buffer<u8>,
    ) -> Result<()> {
        self.check()?;
        self.queue_backward(stream, packed.live(self.tokens)?, args, workspace)
    }

    /// The same where only the device knows the rows that hold anything, as for [`forward_live`](Self::forward_live).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn backward_live(
        &self,
        stream: &Stream,
        live: Option<&Buffer<i32>>,
        args: &NormBackward<'_>,
        workspace: &Buffer<u8>,
    ) -> Result<()> {
        self.check()?;
        self.queue_backward(stream, check_some("live", live, &[1])?, args, workspace)
    }

    fn queue_backward(
        &self,
        stream: &Stream,
        live: Ptr<i32>,
        args: &NormBackward<'_>,
        workspace: &Buffer<u8>,
    ) -> Result<()> {
        let Self { tokens, width, .. } = *self;
        let rows = partial_rows(tokens, width, stream.device().info().multiprocessors);
        let partial: Ptr<f32> =
            check_workspace(workspace, self.backward_workspace_bytes(stream.device()))?.cast();
        let dscale = args.residual.as_ref().and_then(|(_, grad)| grad.dscale);
        let out = [
            check_some("dgain", args.dgain, &[width])?,
            check_some("dbias", args.dbias, &[width])?,
            check_some("dscale", dscale, &[width])?,
        ];
        let mut partials = [Ptr::null(); 3];
        for (i, (partials, out)) in partials.iter_mut().zip(&out).enumerate() {
            *partials = if out.is_null() { Ptr::null() } else { partial.offset(i * rows * width) };
        }
        let mut params = BackwardParams {
            dx: args.dx.check("dx", tokens, width)?,
            dbranch: Ptr::null(),
            dgain: partials[0],
            dbias: partials[1],
            dscale: partials[2],
            dy: args.dy.check("dy", tokens, width)?,
            dresidual: args.dresidual.map_or(Ok(Ptr::null()), |x| x.check("dresidual", tokens, width))?,
            x: args.x.check("x", tokens, width)?,
            branch: Ptr::null(),
            stats: check_aligned("stats", check_len("stats", args.stats, &[tokens, 2])?, STATS_BYTES)?,
            gain: check_wide_some("gain", args.gain, &[width])?,
            scale: Ptr::null(),
            keep: Ptr::null(),
            live,
            dx_stride: args.dx.stride as i64,
            dbranch_stride: 0,
            dy_stride: args.dy.stride as i64,
            dresidual_stride: args.dresidual.map_or(0, |x| x.stride as i64),
            x_stride: args.x.stride as i64,
            branch_stride: 0,
            tokens: tokens as i32,
            width: width as i32,
            layer_norm: self.layer_norm(),
        };
        if let Some((branch, grad)) = &args.residual {
            params.dbranch = grad.dbranch.check("dbranch", tokens, width)?;
            params.dbranch_stride = grad.dbranch.stride as i64;
            params.branch = branch.rows.check("branch", tokens, width)?;
            params.branch_stride = branch.rows.stride as i64;
            (params.scale, params.keep) = branch.factors(tokens, width)?;
        }
        let sums = SumsParams {
            partial: partials,
            out,
            accumulate: check_some("accumulate", args.accumulate, &[1])?,
            count: rows as i32,
            width: width as i32,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe {
            launch_backward(stream.device().kernels(), stream.raw(), &params)?;
            launch_sums(stream.device().kernels(), stream.raw(), &sums)
        }
    }
}
