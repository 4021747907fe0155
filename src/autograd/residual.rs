//! Residual connection with LayerScale and stochastic depth.
//!
//! `out = x + keep ⊙ γ ⊙ f`. Rule: `dx = dout`, `df = keep ⊙ γ ⊙ dout`, `dγ += Σ keep ⊙ dout ⊙ f`.
//! `keep` is 0 or 1/(1−rate) for a whole image, drawn by Philox from (seed, epoch, sample, branch),
//! so that it depends neither on the slot nor on when it is drawn (forward, recompute, backward).

use super::device::{Launch, Matrix, Site, Step};
use super::graph::{Extent, Graph, Node, Tensor};
use super::op::{Args, Io, Op, StepState, on_cpu};
use super::split::Shard;
use crate::cpu;
use crate::cpu::real::Real;
use crate::data::batch::PackedBatch;
use crate::device::Buffer;
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
        // It is only read for the gradient of the scale.
        let kept_branch = dgamma.map(|_| branch);
        let grad = ResidualGrad { drop_path: self.drop_path, rows: self.rows };
        graph.record(grad, vec![Some(dout), kept_branch, gamma], vec![Some(dbranch), dgamma]);
        vec![Some(dout), Some(dbranch), None]
    }
}

/// The gradient of a residual connection. On a device that of a norm takes it along where it makes `dout`.
#[derive(Clone, Copy, Debug)]
pub(super) struct ResidualGrad {
    drop_path: Option<DropPath>,
    rows: Shard,
}

impl ResidualGrad {
    /// On the CPU, with branch and LayerScale from operand `input` on and their gradients from result `output` on.
    pub(super) fn run_at<R: Real>(
        &self,
        a: &mut Args<'_, R>,
        dout: &[R],
        width: usize,
        input: usize,
        output: usize,
    ) {
        let keep = keep(self.drop_path, self.rows, a.batch, a.step);
        let (dbranch, dgamma) = (a.output(output), a.output_opt(output + 1));
        let branch = a.input_opt(input).unwrap_or_default();
        let gamma = a.input_opt(input + 1);
        cpu::residual::backward(dbranch, dgamma, dout, branch, gamma, keep.as_deref(), width);
    }

    /// The same of a device, beside the gradient of the sum.
    pub(super) fn at(&self, site: &mut Site<'_>, input: usize, output: usize) -> Result<BranchSite> {
        let dscale = site.output_f32(output + 1)?;
        Ok(BranchSite {
            // It is only read for the gradient of the scale.
            branch: if dscale.is_some() { Some(site.input(input)?) } else { None },
            scale: site.input_f32(input + 1)?,
            dropped: self.drop_path.map(|drop_path| site.drop_path(drop_path)),
            dbranch: site.output(output)?,
            dscale,
        })
    }
}

/// A residual branch and its gradients on a device.
pub(super) struct BranchSite {
    branch: Option<Matrix>,
    scale: Option<Buffer<f32>>,
    /// Number of the branch whose factors there are.
    dropped: Option<usize>,
    dbranch: Matrix,
    dscale: Option<Buffer<f32>>,
}

impl BranchSite {
    /// As the kernels take it; rows of `dout` stand for a branch that is not read.
    pub(super) fn operands<'s>(
        &'s self,
        step: &'s Step<'_>,
        dout: &'s Matrix,
    ) -> (Branch<'s>, BranchGrad<'s>) {
        let keep = self.dropped.map(|branch| (step.keep(), branch));
        let rows = self.branch.as_ref().unwrap_or(dout).all();
        let grad = BranchGrad { dbranch: self.dbranch.all(), dscale: self.dscale.as_ref() };
        (Branch { rows, scale: self.scale.as_ref(), keep }, grad)
    }
}

impl Op for ResidualGrad {
    fn name(&self) -> &'static str {
        "d residual"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (dout, width) = (a.input(0), a.input_shape(0).1);
            self.run_at(&mut a, dout, width, 1, 0);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let dout = site.input(0)?;
        let (branch, live) = (self.at(site, 1, 0)?, site.live_rows(&dout)?);
        let residual = ResidualKernel { tokens: dout.rows, width: dout.cols };
        site.workspace(residual.backward_workspace_bytes());
        Ok(Box::new(move |step| {
            let (operands, grad) = branch.operands(step, &dout);
            residual.backward(
                step.stream,
                step.rows(&live),
                dout.all(),
                operands,
                grad,
                Some(step.accumulate),
                step.workspace,
            )
        }))
    }
}
