//! Residual connection with LayerScale and stochastic depth.
//!
//! `out = x + keep ⊙ γ ⊙ f`. Rule: `dx = dout`, `df = keep ⊙ γ ⊙ dout`, `dγ += Σ keep ⊙ dout ⊙ f`.
//! `keep` is 0 or 1/(1−rate) for a whole image, drawn by Philox from (seed, epoch, sample, branch),
//! so that it depends neither on the slot nor on when it is drawn (forward, recompute, backward).

use super::device::{Launch, Site};
use super::graph::{Extent, Graph, Node, Tensor};
use super::op::{Io, Op, StepState, on_cpu};
use super::split::Shard;
use crate::cpu;
use crate::cpu::real::Real;
use crate::data::batch::PackedBatch;
use crate::error::Result;
use crate::kernels::residual::{Branch, BranchGrad, Residual as ResidualKernel};
use crate::rng::Stream;

/// Stochastic depth of one residual branch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropPath {
    /// Probability that the branch is left out for an image.
    pub rate: f64,
    /// Number of the branch, the key of its random numbers.
    pub branch: u32,
}

/// `x + keep ⊙ gamma ⊙ branch`.
pub fn residual(
    graph: &mut Graph,
    x: Tensor,
    branch: Tensor,
    gamma: Option<Tensor>,
    drop_path: Option<DropPath>,
) -> Tensor {
    let drop_path = drop_path.filter(|d| d.rate > 0.0);
    let out = graph.activation_like(x);
    let rows = rows_of(graph, x);
    graph.record(Residual { drop_path, rows }, vec![Some(x), Some(branch), gamma], vec![Some(out)]);
    out
}

/// Which token rows `x` has.
fn rows_of(graph: &Graph, x: Tensor) -> Shard {
    match graph.info(x).extent {
        Extent::Shard(shard) => shard,
        _ => Shard::WHOLE,
    }
}

/// One factor a live token of `rows`, or `None` where nothing is dropped.
pub(super) fn keep<R: Real>(
    drop_path: Option<DropPath>,
    rows: Shard,
    batch: &PackedBatch,
    step: &StepState,
) -> Option<Vec<R>> {
    let DropPath { rate, branch } = drop_path?;
    let kept = R::of(1.0 / (1.0 - rate));
    let mut keep = Vec::with_capacity(batch.live_tokens());
    for slot in 0..batch.images {
        let mut stream = Stream::drop_path(step.seed, batch.epochs[slot], batch.sample_ids[slot], branch);
        let dropped = f64::from(stream.uniform()) < rate;
        let factor = if dropped { R::ZERO } else { kept };
        keep.resize(keep.len() + batch.range(slot).len(), factor);
    }
    if rows.is_part() {
        let part = batch.tokens() / rows.size;
        let live = rows.live(keep.len(), part);
        keep.drain(..(rows.rank * part).min(keep.len()));
        keep.truncate(live);
    }
    Some(keep)
}

#[derive(Debug)]
pub(super) struct Residual {
    pub drop_path: Option<DropPath>,
    /// Which token rows it is about.
    rows: Shard,
}

impl Op for Residual {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn result(&self, _: usize) -> &'static str {
        "residual stream"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(1).1;
            let keep = keep(self.drop_path, self.rows, a.batch, a.step);
            cpu::residual::forward(a.output(0), a.input(1), a.input_opt(2), keep.as_deref(), width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (x, branch, out) = (site.input(0)?, site.input(1)?, site.output(0)?);
        let (scale, live) = (site.input_f32(2)?, site.live_rows(&x)?);
        let dropped = self.drop_path.map(|drop_path| site.drop_path(drop_path));
        let residual = ResidualKernel { tokens: x.rows, width: x.cols };
        Ok(Box::new(move |step| {
            let keep = dropped.map(|branch| (step.keep(), branch));
            let branch = Branch { rows: branch.all(), scale: scale.as_ref(), keep };
            let packed = step.rows(&live);
            residual.forward(step.stream, packed, out.all(), x.all(), branch)
        }))
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dout) = grads[0] else { return vec![None; 3] };
        let (branch, gamma) = (node.input(1), node.inputs[2]);
        if gamma.is_none() && self.drop_path.is_none() {
            return vec![Some(dout), Some(dout), None];
        }
        let dbranch = graph.activation_like(branch);
        let dgamma = gamma.and_then(|t| graph.gradient_of(t));
        // Nothing else keeps the branch.
        let kept_branch = dgamma.map(|_| branch);
        let grad = ResidualGrad { drop_path: self.drop_path, rows: self.rows };
        graph.record(grad, vec![Some(dout), kept_branch, gamma], vec![Some(dbranch), dgamma]);
        vec![Some(dout), Some(dbranch), None]
    }
}

#[derive(Debug)]
struct ResidualGrad {
    drop_path: Option<DropPath>,
    rows: Shard,
}

impl Op for ResidualGrad {
    fn name(&self) -> &'static str {
        "d residual"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(0).1;
            let keep = keep(self.drop_path, self.rows, a.batch, a.step);
            let (dbranch, dgamma) = (a.output(0), a.output_opt(1));
            let branch = a.input_opt(1).unwrap_or_default();
            cpu::residual::backward(
                dbranch,
                dgamma,
                a.input(0),
                branch,
                a.input_opt(2),
                keep.as_deref(),
                width,
            );
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (dout, dbranch) = (site.input(0)?, site.output(0)?);
        let (scale, dscale, live) = (site.input_f32(2)?, site.output_f32(1)?, site.live_rows(&dout)?);
        let branch = if dscale.is_some() { Some(site.input(1)?) } else { None };
        let dropped = self.drop_path.map(|drop_path| site.drop_path(drop_path));
        let residual = ResidualKernel { tokens: dout.rows, width: dout.cols };
        site.workspace(residual.backward_workspace_bytes());
        Ok(Box::new(move |step| {
            let keep = dropped.map(|branch| (step.keep(), branch));
            // The branch is only read for the gradient of the scale.
            let rows = branch.as_ref().unwrap_or(&dout).all();
            let grad = BranchGrad { dbranch: dbranch.all(), dscale: dscale.as_ref() };
            residual.backward(
                step.stream,
                step.rows(&live),
                dout.all(),
                Branch { rows, scale: scale.as_ref(), keep },
                grad,
                Some(step.accumulate),
                step.workspace,
            )
        }))
    }
}
