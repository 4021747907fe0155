//! Checked launches.

use std::ops::Range;

use half::bf16;

use super::adafactor::{StatisticTables, Statistics};
use super::arena::{Arena, Tables};
use super::raw::{
    AddParams, CastParams, NormParams, RestParams, UpdateParams, ZeroParams, launch_adamw, launch_add,
    launch_cast, launch_finish, launch_lamb, launch_lamb_rates, launch_lamb_squares, launch_norm,
    launch_rest_squares, launch_sgd, launch_squares, launch_zero, norm_blocks,
};
use super::squared::Squared;
use super::step::{OptimizerState, OptimizerStep};
use crate::device::{Buffer, Device, Ptr, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{check_len, check_some, check_workspace};

/// Bytes of workspace of a step of the optimiser on a device.
pub fn workspace_bytes(arena: &Arena, device: &Device) -> usize {
    let norm = norm_blocks(device.info().multiprocessors, arena.len()) * size_of::<f64>();
    norm.max(rates_offset(arena) + arena.tensors().len() * size_of::<f32>())
}

/// Where LAMB's rates begin in the workspace, after its partial sums.
fn rates_offset(arena: &Arena) -> usize {
    arena.chunks().len() * 2 * size_of::<f64>()
}

/// What a rule keeps of the gradients.
#[derive(Clone, Copy)]
pub enum Moments<'a> {
    /// Of SGD.
    Momentum {
        /// An arena.
        m: &'a Buffer<f32>,
        /// Whether a step looks ahead by one momentum.
        nesterov: bool,
    },
    /// Of AdamW and LAMB.
    Adam {
        /// First moments, an arena.
        m: &'a Buffer<f32>,
        /// Second moments, an arena.
        v: &'a Buffer<f32>,
    },
    /// Of Adafactor.
    Factored {
        /// Momentum, an arena.
        m: &'a Buffer<bf16>,
        /// What is kept of the second moments of whole parameters, as long as `statistics`.
        v: &'a Buffer<f32>,
        /// For which parameters.
        statistics: &'a Statistics,
        /// Its tables.
        tables: &'a StatisticTables,
    },
}

/// A rule that was given what another keeps.
pub(super) fn another(rule: &str, moments: Moments<'_>) -> Error {
    let of = match moments {
        Moments::Momentum { .. } => "SGD",
        Moments::Adam { .. } => "AdamW and LAMB",
        Moments::Factored { .. } => "Adafactor",
    };
    Error::usage(format!("{rule} was given the moments of {of}; give its own"))
}

/// Operands of a step. All arenas have the layout of [`arena`](Self::arena) and its length.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    /// The layout.
    pub arena: &'a Arena,
    /// Its tables.
    pub tables: &'a Tables,
    /// Parameters, changed in place.
    pub params: &'a Buffer<f32>,
    /// Gradients. LAMB leaves its update here.
    pub grads: &'a Buffer<f32>,
    /// Where squares of some are known already.
    pub squared: Option<&'a Squared>,
    /// What the rule keeps of the gradients, changed in place.
    pub moments: Moments<'a>,
    /// Parameters in bf16, written.
    pub weights: Option<&'a Buffer<bf16>>,
    /// Moving average of the parameters, changed in place.
    pub average: Option<&'a Buffer<f32>>,
    /// One: what the host says.
    pub step: &'a Buffer<OptimizerStep>,
    /// One: what the kernels keep.
    pub state: &'a Buffer<OptimizerState>,
    /// Whether `weights` are rounded randomly, keyed by seed, step and place, rather than to nearest.
    pub stochastic: bool,
    /// At least [`workspace_bytes`].
    pub workspace: &'a Buffer<u8>,
}

impl Operands<'_> {
    /// Queues norm and clipping of the gradients, then AdamW. Where the norm is not finite, nothing changes but
    /// the state's `skipped`, `norm` and `skip`; where the step is [unfinished](OptimizerStep::unfinished), nothing
    /// but `skip`.
    ///
    /// # Errors
    /// Buffers of another size than the arena asks for, a launch that the device refuses.
    pub fn adamw(&self, stream: &Stream) -> Result<()> {
        let update = self.adam_params("AdamW", stream)?;
        self.norm(stream)?;
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_adamw(stream.device().kernels(), stream.raw(), self.arena.chunks().len(), &update) }
    }

    /// Queues norm and clipping of the gradients, then SGD; as [`adamw`](Self::adamw) where the norm is not finite.
    ///
    /// # Errors
    /// As for [`adamw`](Self::adamw).
    pub fn sgd(&self, stream: &Stream) -> Result<()> {
        let update = self.sgd_params(stream)?;
        self.norm(stream)?;
        // SAFETY: as above.
        unsafe { launch_sgd(stream.device().kernels(), stream.raw(), self.arena.chunks().len(), &update) }
    }

    /// Queues norm, factors and the decision whether the step is taken.
    pub(super) fn norm(&self, stream: &Stream) -> Result<()> {
        let mut norm = self.norm_params(stream)?;
        let kernels = stream.device().kernels();
        let Some(squared) = self.squared else {
            // SAFETY: as above.
            return unsafe { launch_norm(kernels, stream.raw(), &norm) };
        };
        check_len("grads", self.grads, &[squared.arena])?;
        norm.blocks = squared.blocks as i32;
        let rest = RestParams {
            grads: norm.grads,
            chunks: squared.chunks.ptr(),
            squares: squared.sums.ptr(),
            partial: norm.partial,
            step: norm.step,
            square_count: squared.sums.len() as i64,
            chunk_count: squared.chunks.len() as i32,
            unused: 0,
        };
        // SAFETY: as above; the chunks are some of an arena of that length, and each block has its place in the workspace.
        unsafe {
            launch_rest_squares(kernels, stream.raw(), squared.blocks, &rest)?;
            launch_finish(kernels, stream.raw(), &norm)
        }
    }

    /// The same from sums of `squares`.
    pub(super) fn norm_of(&self, stream: &Stream, squares: &Buffer<f64>) -> Result<()> {
        let mut norm = self.norm_params(stream)?;
        (norm.partial, norm.blocks) = (squares.ptr(), squares.len() as i32);
        // SAFETY: as above; the sums are as many as the kernel is told.
        unsafe { launch_finish(stream.device().kernels(), stream.raw(), &norm) }
    }

    /// Queues the sums of squares of the gradients `counted`, as many as `out` has; their ends are multiples of
    /// 8. Where the step is [unfinished](OptimizerStep::unfinished), nothing is written.
    ///
    /// # Errors
    /// A range that is not in the arena, buffers of another size than the arena asks for, a launch that the device
    /// refuses.
    pub fn squares(&self, stream: &Stream, counted: Range<usize>, out: &Buffer<f64>) -> Result<()> {
        let eights = counted.start.is_multiple_of(8) && counted.end.is_multiple_of(8);
        if !eights || counted.start > counted.end || counted.end > self.arena.len() || out.is_empty() {
            return Err(Error::usage(format!(
                "gradients {counted:?} of {} cannot be counted; give multiples of 8 within the arena, and at least one \
                 place for a sum",
                self.arena.len()
            )));
        }
        let mut norm = self.norm_params(stream)?;
        norm.grads = norm.grads.offset(counted.start);
        norm.size = counted.len() as i64;
        (norm.partial, norm.blocks) = (out.ptr(), out.len() as i32);
        // SAFETY: the range lies in a live buffer, and every block has its place in `out`.
        unsafe { launch_squares(stream.device().kernels(), stream.raw(), &norm) }
    }

    /// [`adamw`](Self::adamw) with the norm of gradients whose sums of `squares` are given.
    ///
    /// # Errors
    /// As for [`adamw`](Self::adamw).
    pub fn adamw_of(&self, stream: &Stream, squares: &Buffer<f64>) -> Result<()> {
        let update = self.adam_params("AdamW", stream)?;
        self.norm_of(stream, squares)?;
        // SAFETY: as above.
        unsafe { launch_adamw(stream.device().kernels(), stream.raw(), self.arena.chunks().len(), &update) }
    }

    /// [`sgd`](Self::sgd) with the norm of gradients whose sums of `squares` are given.
    ///
    /// # Errors
    /// As for [`adamw`](Self::adamw).
    pub fn sgd_of(&self, stream: &Stream, squares: &Buffer<f64>) -> Result<()> {
        let update = self.sgd_params(stream)?;
        self.norm_of(stream, squares)?;
        // SAFETY: as above.
        unsafe { launch_sgd(stream.device().kernels(), stream.raw(), self.arena.chunks().len(), &update) }
    }

    /// Queues norm and clipping of the gradients, then LAMB; as [`adamw`](Self::adamw) where the norm is not
    /// finite.
    ///
    /// # Errors
    /// As for [`adamw`](Self::adamw).
    pub fn lamb(&self, stream: &Stream) -> Result<()> {
        let (update, arena) = (self.adam_params("LAMB", stream)?, self.arena);
        self.norm(stream)?;
        let kernels = stream.device().kernels();
        // SAFETY: as above.
        unsafe { launch_lamb(kernels, stream.raw(), arena.chunks().len(), arena.tensors().len(), &update) }
    }

    /// Queues norm and clipping of gradients whose sums of `squares` are given, then LAMB up to what a tensor's step
    /// needs of all of it: `out`, of shape `[wholes, 2]`, gets the squares of parameters and updates of the slices
    /// that lie in the first `counted` elements. What is of no such slice stays as it is, and is 0 to begin with.
    ///
    /// # Errors
    /// As for [`adamw`](Self::adamw).
    pub fn lamb_squares(
        &self,
        stream: &Stream,
        squares: &Buffer<f64>,
        counted: usize,
        out: &Buffer<f64>,
    ) -> Result<()> {
        let mut update = self.adam_params("LAMB", stream)?;
        update.squares = check_len("out", out, &[self.arena.wholes(), 2])?;
        self.norm_of(stream, squares)?;
        let slices = self.arena.ranges().partition_point(|slice| slice.end <= counted);
        let kernels = stream.device().kernels();
        // SAFETY: as above; the slices are those of the arena, and each has its place in `out`.
        unsafe { launch_lamb_squares(kernels, stream.raw(), self.arena.chunks().len(), slices, &update) }
    }

    /// Queues the rest of LAMB from `squares`, of shape `[ranks, wholes, 2]`: what
    /// [`lamb_squares`](Self::lamb_squares) has left on each rank.
    ///
    /// # Errors
    /// As for [`adamw`](Self::adamw).
    pub fn lamb_of(&self, stream: &Stream, squares: &Buffer<f64>) -> Result<()> {
        let (mut update, arena) = (self.adam_params("LAMB", stream)?, self.arena);
        let ranks = (squares.len() / (2 * arena.wholes()).max(1)).max(1);
        update.squares = check_len("squares", squares, &[ranks, arena.wholes(), 2])?;
        update.ranks = ranks as i32;
        let kernels = stream.device().kernels();
        // SAFETY: as above.
        unsafe {
            launch_lamb_rates(kernels, stream.raw(), arena.chunks().len(), arena.tensors().len(), &update)
        }
    }

    fn norm_params(&self, stream: &Stream) -> Result<NormParams> {
        let Self { arena, workspace, .. } = self;
        let device = stream.device();
        Ok(NormParams {
            grads: check_len("grads", self.grads, &[arena.len()])?,
            partial: check_workspace(workspace, workspace_bytes(arena, device))?.cast(),
            step: check_len("step", self.step, &[1])?,
            state: check_len("state", self.state, &[1])?,
            size: arena.len() as i64,
            blocks: norm_blocks(device.info().multiprocessors, arena.len()) as i32,
            unused: 0,
        })
    }

    fn adam_params(&self, rule: &str, stream: &Stream) -> Result<UpdateParams> {
        let Moments::Adam { m, v } = self.moments else { return Err(another(rule, self.moments)) };
        let len = &[self.arena.len()];
        let (m, v) = (check_len("m", m, len)?, check_len("v", v, len)?);
        Ok(UpdateParams { m, v, ..self.update_params(stream)? })
    }

    fn sgd_params(&self, stream: &Stream) -> Result<UpdateParams> {
        let Moments::Momentum { m, nesterov } = self.moments else {
            return Err(another("SGD", self.moments));
        };
        let m = check_len("m", m, &[self.arena.len()])?;
        Ok(UpdateParams { m, nesterov: i32::from(nesterov), ..self.update_params(stream)? })
    }

    /// Without moments.
    pub(super) fn update_params(&self, stream: &Stream) -> Result<UpdateParams> {
        let Self { arena, tables, .. } = self;
        let len = &[arena.len()];
        let workspace = check_workspace(self.workspace, workspace_bytes(arena, stream.device()))?;
        Ok(UpdateParams {
            params: check_len("params", self.params, len)?,
            grads: check_len("grads", self.grads, len)?,
            m: Ptr::null(),
            v: Ptr::null(),
            weights: check_some("weights", self.weights, len)?,
            average: check_some("average", self.average, len)?,
            tensors: check_len("tensors", &tables.tensors, &[arena.tensors().len()])?,
            chunks: check_len("chunks", &tables.chunks, &[arena.chunks().len()])?,
            step: check_len("step", self.step, &[1])?,
            state: check_len("state", self.state, &[1])?,
            partial: workspace.cast(),
            rates: workspace.offset(rates_offset(arena)).cast(),
            squares: Ptr::null(),
            stochastic: i32::from(self.stochastic),
            ranks: 0,
            wholes: arena.wholes() as i32,
            nesterov: 0,
        })
    }
}

/// Queues zeros over all of `out`, whose length is a multiple of 8; with `step` only where that does not
/// [continue](OptimizerStep::continues) another.
///
/// # Errors
/// Another length, a launch that the device refuses.
pub fn zero(stream: &Stream, out: &Buffer<f32>, step: Option<&Buffer<OptimizerStep>>) -> Result<()> {
    let params = ZeroParams {
        out: out.ptr(),
        step: check_some("step", step, &[1])?,
        size: check_eights("out", out.len())?,
    };
    // SAFETY: a live buffer of that size; the stream orders its later use.
    unsafe { launch_zero(stream.device().kernels(), stream.raw(), &params) }
}

/// Queues `out += x`, both of one length, a multiple of 8.
///
/// # Errors
/// Other lengths, a launch that the device refuses.
pub fn add(stream: &Stream, out: &Buffer<f32>, x: &Buffer<f32>) -> Result<()> {
    let x_ptr = check_len("x", x, &[out.len()])?;
    let params = AddParams { out: out.ptr(), x: x_ptr, size: check_eights("out", out.len())? };
    // SAFETY: live buffers of that size; the stream orders their later use.
    unsafe { launch_add(stream.device().kernels(), stream.raw(), &params) }
}

/// Queues the copy of `x` in bf16, both of one length, a multiple of 8. With `stochastic` it is the copy that
/// the last step of an optimiser with this seed and state wrote: so a resumed run has the bits of one that was
/// never stopped.
///
/// # Errors
/// Other lengths, a launch that the device refuses.
pub fn cast(
    stream: &Stream,
    out: &Buffer<bf16>,
    x: &Buffer<f32>,
    stochastic: Option<(&Buffer<OptimizerStep>, &Buffer<OptimizerState>)>,
) -> Result<()> {
    let (step, state) = match stochastic {
        Some((step, state)) => (check_len("step", step, &[1])?, check_len("state", state, &[1])?),
        None => (Ptr::null(), Ptr::null()),
    };
    let params = CastParams {
        out: check_len("out", out, &[x.len()])?,
        x: x.ptr(),
        step,
        state,
        size: check_eights("x", x.len())?,
    };
    // SAFETY: live buffers of that size; the stream orders their later use.
    unsafe { launch_cast(stream.device().kernels(), stream.raw(), &params) }
}

fn check_eights(name: &str, len: usize) -> Result<i64> {
    match i64::try_from(len) {
        Ok(size) if size > 0 && size % 8 == 0 => Ok(size),
        _ => Err(Error::usage(format!(
            "{name} has {len} elements, expected a multiple of 8 and at least 8; make it as long as the arena"
        ))),
    }
}
