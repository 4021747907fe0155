//! Adafactor: momentum in bf16, and of the second moments means over rows and columns of whole parameters, which every
//! rank keeps ([`crate::cpu::optim::adafactor`] has the formulas).

mod raw;
mod tables;

use half::bf16;

use super::arena::Arena;
use super::checked::{Moments, Operands, another};
use super::raw::UpdateParams;
use crate::device::{Buffer, Ptr, Stream};
use crate::error::Result;
use crate::kernels::operand::check_len;
use crate::kernels::optim::zero;

pub use raw::{AdafactorBlocks, AdafactorParams, launch_adafactor_of, launch_adafactor_sums};
pub use tables::{FactoredEntry, Lines, StatisticTables, Statistics, WholeEntry, WholeSpec};

impl Operands<'_> {
    /// Queues norm and clipping of the gradients, then Adafactor; as [`adamw`](Self::adamw) where the norm is not finite.
    ///
    /// # Errors
    /// As for [`adamw`](Self::adamw).
    pub fn adafactor(&self, stream: &Stream) -> Result<()> {
        self.norm(stream)?;
        self.adafactor_statistics(stream, self.arena.len())?;
        self.adafactor_of(stream)
    }

    /// Queues norm and clipping of gradients whose sums of `squares` are given, then the sums of their squares over rows
    /// and columns, of what lies in the first `counted` elements: all ranks add up their [`StatisticTables::sums`], and
    /// go on with [`adafactor_of`](Self::adafactor_of).
    ///
    /// # Errors
    /// As for [`adamw`](Self::adamw).
    pub fn adafactor_sums(&self, stream: &Stream, squares: &Buffer<f64>, counted: usize) -> Result<()> {
        self.norm_of(stream, squares)?;
        self.adafactor_statistics(stream, counted)
    }

    fn adafactor_statistics(&self, stream: &Stream, counted: usize) -> Result<()> {
        let (params, blocks, sums) = self.adafactor_params(stream, counted)?;
        // Places of what this rank has nothing of, or does not count.
        zero(stream, sums, None)?;
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_adafactor_sums(stream.device().kernels(), stream.raw(), blocks, &params) }
    }

    /// Queues the rest of Adafactor from the sums of all ranks.
    ///
    /// # Errors
    /// As for [`adamw`](Self::adamw).
    pub fn adafactor_of(&self, stream: &Stream) -> Result<()> {
        let (params, blocks, _) = self.adafactor_params(stream, 0)?;
        // SAFETY: as above.
        unsafe { launch_adafactor_of(stream.device().kernels(), stream.raw(), blocks, &params) }
    }

    fn adafactor_params(
        &self,
        stream: &Stream,
        counted: usize,
    ) -> Result<(AdafactorParams, AdafactorBlocks, &Buffer<f32>)> {
        let Moments::Factored { m, v, statistics, tables } = self.moments else {
            return Err(another("Adafactor", self.moments));
        };
        let arena = self.arena;
        check_len("tensors", &tables.tensors, &[arena.tensors().len()])?;
        check_len("sums", &tables.sums, &[statistics.len()])?;
        let (m, v) = (check_len("m", m, &[arena.len()])?, check_len("v", v, &[statistics.len()])?);
        let (params, blocks) = tables.params(self.update_params(stream)?, m, v, arena);
        let counted = arena.ranges().partition_point(|tensor| tensor.end <= counted) as i32;
        Ok((AdafactorParams { counted, ..params }, blocks, &tables.sums))
    }
}

impl StatisticTables {
    /// Arguments of raw launches over `arena`, of which this rank counts all.
    pub fn params(
        &self,
        update: UpdateParams,
        m: Ptr<bf16>,
        v: Ptr<f32>,
        arena: &Arena,
    ) -> (AdafactorParams, AdafactorBlocks) {
        let params = AdafactorParams {
            update,
            m,
            v,
            sums: self.sums.ptr(),
            factors: self.factors.ptr(),
            line_factors: self.line_factors.ptr(),
            partial: self.partial.ptr(),
            tensors: self.tensors.ptr(),
            wholes: self.wholes.ptr(),
            tile_tensors: self.tile_tensors.ptr(),
            line_tensors: self.line_tensors.ptr(),
            places: self.places.ptr(),
            counted: self.tensors.len() as i32,
            unused: 0,
        };
        let blocks = AdafactorBlocks {
            tiles: self.tile_tensors.len(),
            lines: self.line_tensors.len(),
            wholes: self.wholes.len(),
            chunks: arena.chunks().len(),
        };
        (params, blocks)
    }
}
