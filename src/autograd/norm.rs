//! LayerNorm and RMSNorm.
//!
//! `y = n ⊙ γ + β` with `n = (x − μ)·rstd`. Rule, with `g = dy ⊙ γ`:
//! `dx = rstd·(g − mean(g) − n·mean(g ⊙ n))` (RMSNorm: μ = 0 and no `mean(g)`),
//! `dγ += Σ dy ⊙ n`, `dβ += Σ dy`.

use super::device::{Element, Launch, Matrix, Site};
use super::graph::{Graph, Node, Tensor};
use super::op::{Io, Op, on_cpu};
use crate::cpu;
use crate::error::Result;
use crate::kernels::norm::{Norm as NormKernel, NormBackward, NormForward};
use crate::recipe::NormKind;

/// Normalises the rows of `x[m, D]`; `gain[D]` and `bias[D]` may be absent.
pub fn norm(
    graph: &mut Graph,
    x: Tensor,
    gain: Option<Tensor>,
    bias: Option<Tensor>,
    kind: NormKind,
    eps: f64,
) -> Tensor {
    let y = graph.activation_like(x);
    let (rows, extent) = (graph.info(x).rows, graph.info(x).extent);
    let stats = graph.activation(rows, 2, extent);
    graph.record(Norm { kind, eps }, vec![Some(x), gain, bias], vec![Some(y), Some(stats)]);
    y
}

#[derive(Debug)]
struct Norm {
    kind: NormKind,
    eps: f64,
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        match self.kind {
            NormKind::LayerNorm => "layernorm",
            NormKind::Rms => "rmsnorm",
        }
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(0).1;
            let (y, stats) = (a.output(0), a.output(1));
            let (gain, bias) = (a.input_opt(1), a.input_opt(2));
            cpu::norm::forward(y, stats, a.input(0), gain, bias, width, self.kind, self.eps);
        });
    }

    /// Mean and reciprocal standard deviation.
    fn element(&self, i: usize) -> Element {
        if i == 1 { Element::F32 } else { Element::Bf16 }
    }

    /// Its statistics come with it, but nobody makes it for them alone.
    fn recompute(&self, node: &Node, i: usize) -> Option<Node> {
        (i == 0).then(|| node.clone())
    }

    fn result(&self, i: usize) -> &'static str {
        ["norms", "statistics"][i]
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (x, y, stats) = (site.input(0)?, site.output(0)?, site.output_f32(1)?);
        let (gain, bias) = (site.input_f32(1)?, site.input_f32(2)?);
        let (stats, live) = (site.present(stats)?, site.live_rows(&x)?);
        let norm = NormKernel { tokens: x.rows, width: site.input_cols(0), kind: self.kind, eps: self.eps };
        norm.check()?;
        Ok(Box::new(move |step| {
            let operands = NormForward {
                x: x.all(),
                residual: None,
                gain: gain.as_ref(),
                bias: bias.as_ref(),
                y: y.all(),
                stats: &stats,
            };
            norm.forward(step.stream, step.rows(&live), &operands)
        }))
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dy) = grads[0] else { return vec![None; 3] };
        let x = node.input(0);
        let dx = graph.activation_like(x);
        let dgain = node.inputs[1].and_then(|t| graph.gradient_of(t));
        let dbias = node.inputs[2].and_then(|t| graph.gradient_of(t));
        graph.record(
            NormGrad(self.kind),
            vec![Some(dy), Some(x), node.outputs[1], node.inputs[1]],
            vec![Some(dx), dgain, dbias],
        );
        vec![Some(dx), None, None]
    }
}

#[derive(Debug)]
pub(super) struct NormGrad(pub NormKind);

impl Op for NormGrad {
    fn name(&self) -> &'static str {
        "d norm"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(1).1;
            let (dx, dgain, dbias) = (a.output(0), a.output_opt(1), a.output_opt(2));
            let (dy, x, stats) = (a.input(0), a.input(1), a.input(2));
            cpu::norm::backward(dx, dgain, dbias, dy, x, stats, a.input_opt(3), width, self.0);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        prepare_grad(site, self.0, 0)
    }
}

/// `dx = dresidual + d norm`, in the place of `dresidual`: what reads `x` beside the norm has its share in the
/// same pass.
#[derive(Debug)]
pub(super) struct NormGradAdd(pub NormKind);

impl Op for NormGradAdd {
    fn name(&self) -> &'static str {
        "add d norm"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(2).1;
            let (dx, dgain, dbias) = (a.output(0), a.output_opt(1), a.output_opt(2));
            let (dy, x, stats) = (a.input(1), a.input(2), a.input(3));
            let mut own = dx.to_vec();
            cpu::norm::backward(&mut own, dgain, dbias, dy, x, stats, a.input_opt(4), width, self.0);
            cpu::elementwise::add(dx, &own);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        prepare_grad(site, self.0, 1)
    }
}

/// The gradient of a norm whose operands begin at `first`; before them stands what is added to it.
fn prepare_grad(site: &mut Site<'_>, kind: NormKind, first: usize) -> Result<Launch> {
    let (dy, x, dx) = (site.input(first)?, site.input(first + 1)?, site.output(0)?);
    let dresidual = if first > 0 { Some(site.input(0)?) } else { None };
    let (stats, gain) = (site.input_f32(first + 2)?, site.input_f32(first + 3)?);
    let (dgain, dbias) = (site.output_f32(1)?, site.output_f32(2)?);
    let (stats, live) = (site.present(stats)?, site.live_rows(&x)?);
    // The epsilon is in the statistics.
    let norm = NormKernel { tokens: x.rows, width: site.input_cols(first + 1), kind, eps: 0.0 };
    norm.check()?;
    site.workspace(norm.backward_workspace_bytes(site.device()));
    Ok(Box::new(move |step| {
        let operands = NormBackward {
            dy: dy.all(),
            dresidual: dresidual.as_ref().map(Matrix::all),
            x: x.all(),
            stats: &stats,
            gain: gain.as_ref(),
            residual: None,
            dx: dx.all(),
            dgain: dgain.as_ref(),
            dbias: dbias.as_ref(),
            accumulate: Some(step.accumulate),
        };
        let packed = step.rows(&live);
        norm.backward(step.stream, packed, &operands, step.workspace)
    }))
}
