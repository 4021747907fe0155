//! The gradient of a bias where no other kernel makes it.

use half::bf16;

use crate::Result;
use crate::device::{Kernels, RawStream, Stream};

use super::checked::check_extent;
use super::memory::{Matrix, Vector};
use super::raw::{self, BiasGradParams, SumRowsParams};

/// Column sums of a gradient in bf16: the gradient of a bias where no other kernel makes it.
#[derive(Clone, Copy, Debug)]
pub struct BiasGrad<'a> {
    /// Gradient, `[m, n]`; `n` is a multiple of 8.
    pub dy: Matrix<'a, bf16>,
    /// Its rows.
    pub m: usize,
    /// Its columns.
    pub n: usize,
    /// One number: the rows that hold anything; the others are not read. [`Vector::none`]: all.
    pub live: Vector<'a, i32>,
    /// Column sums, `[n]`.
    pub out: Vector<'a, f32>,
    /// One number: whether `out` is added to (not 0) or overwritten (0, or [`Vector::none`]).
    pub accumulate: Vector<'a, i32>,
}

impl BiasGrad<'_> {
    /// Bytes of workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        raw::bias_grad_workspace_bytes(self.m, self.n)
    }

    /// Verifies everything that can be verified without reading device memory.
    ///
    /// # Errors
    /// The first thing that is not as the fields say.
    pub fn check(&self, workspace: &Vector<'_, u8>) -> Result<()> {
        check_extent("m", self.m, false)?;
        check_extent("n", self.n, true)?;
        self.dy.check("dy", [self.m, self.n])?;
        self.live.check_optional("live", 1)?;
        self.out.check("out", self.n)?;
        self.accumulate.check_optional("accumulate", 1)?;
        workspace.check_workspace(self.workspace_bytes())
    }

    /// Queues the sums on a stream of `kernels`' device that any engine has made.
    ///
    /// # Errors
    /// As for [`check`](Self::check); or the device refuses a launch.
    ///
    /// # Safety
    /// `stream` is a live stream of the device.
    pub unsafe fn launch_on(
        &self,
        kernels: &Kernels,
        stream: RawStream,
        workspace: &Vector<'_, u8>,
    ) -> Result<()> {
        self.check(workspace)?;
        let params = BiasGradParams {
            dy: self.dy.ptr(),
            live: self.live.ptr(),
            partial: workspace.ptr().cast(),
            ld: self.dy.stride() as i64,
            m: self.m as i32,
            n: self.n as i32,
            rows: raw::BIAS_GRAD_ROWS as i32,
        };
        let sums = SumRowsParams {
            rows: workspace.ptr().cast(),
            out: self.out.ptr(),
            accumulate: self.accumulate.ptr(),
            count: self.m.div_ceil(raw::BIAS_GRAD_ROWS) as i32,
            cols: self.n as i32,
        };
        // SAFETY: matrix, vectors and workspace lie in memory of sufficient length, as `check` has found;
        // whoever made them answers for that memory, the caller for the stream.
        unsafe {
            raw::bias_grad(kernels, stream, &params)?;
            raw::sum_rows(kernels, stream, &sums)
        }
    }

    /// Queues the sums.
    ///
    /// # Errors
    /// As for [`check`](Self::check); or the device refuses a launch.
    pub fn launch(&self, stream: &Stream, workspace: &Vector<'_, u8>) -> Result<()> {
        // SAFETY: `stream` lives, and the kernels are those of its device.
        unsafe { self.launch_on(stream.device().kernels(), stream.raw(), workspace) }
    }
}
