//! LayerNorm and RMSNorm.
//!
//! `y = n ⊙ γ + β` with `n = (x − μ)·rstd`. Rule, with `g = dy ⊙ γ`:
//! `dx = rstd·(g − mean(g) − n·mean(g ⊙ n))` (RMSNorm: μ = 0 and no `mean(g)`),
//! `dγ += Σ dy ⊙ n`, `dβ += Σ dy`.

use super::device::{Element, Launch, Matrix, Site};
use super::graph::{Graph, Node, Tensor};
use super::op::{Io, Op, on_cpu};
use super::residual::ResidualGrad;
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
            NormGrad { kind: self.kind, adds: false, residual: None },
            vec![None, Some(dy), Some(x), node.outputs[1], node.inputs[1]],
            vec![Some(dx), dgain, dbias],
        );
        vec![Some(dx), None, None]
    }
}

/// The gradient of a norm; on a device with what stands beside it, while the rows are in registers: first the sum
/// with the gradient of what else reads `x`, in the place of that, then the gradient of the residual connection
/// whose sum `x` is. Operands are that gradient, `dy`, `x`, the statistics, the gain, and the branch and LayerScale
/// of the residual connection; results `dx`, `dgain`, `dbias`, and the gradients of branch and LayerScale.
#[derive(Debug)]
pub(super) struct NormGrad {
    /// Which norm.
    pub kind: NormKind,
    /// Whether something else reads `x`.
    pub adds: bool,
    /// The residual connection.
    pub residual: Option<ResidualGrad>,
}

impl NormGrad {
    /// First of the operands of the residual connection.
    const BRANCH: usize = 5;
    /// First of its results.
    const DBRANCH: usize = 3;
}

impl Op for NormGrad {
    fn name(&self) -> &'static str {
        match (self.adds, self.residual.is_some()) {
            (false, false) => "d norm",
            (true, false) => "add d norm",
            (false, true) => "d norm residual",
            (true, true) => "add d norm residual",
        }
    }

    fn in_place(&self) -> bool {
        self.adds
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(2).1;
            let (dx, dgain, dbias) = (a.output(0), a.output_opt(1), a.output_opt(2));
            let (dy, x, stats, gain) = (a.input(1), a.input(2), a.input(3), a.input_opt(4));
            if self.adds {
                let mut own = dx.to_vec();
                cpu::norm::backward(&mut own, dgain, dbias, dy, x, stats, gain, width, self.kind);
                cpu::elementwise::add(dx, &own);
            } else {
                cpu::norm::backward(dx, dgain, dbias, dy, x, stats, gain, width, self.kind);
            }
            if let Some(residual) = &self.residual {
                residual.run_at(&mut a, dx, width, Self::BRANCH, Self::DBRANCH);
            }
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (dy, x, dx) = (site.input(1)?, site.input(2)?, site.output(0)?);
        let dresidual = if self.adds { Some(site.input(0)?) } else { None };
        let (stats, gain) = (site.input_f32(3)?, site.input_f32(4)?);
        let (dgain, dbias) = (site.output_f32(1)?, site.output_f32(2)?);
        let (stats, live) = (site.present(stats)?, site.live_rows(&x)?);
        let residual = self.residual.as_ref();
        let residual = residual.map(|residual| residual.at(site, Self::BRANCH, Self::DBRANCH)).transpose()?;
        // The epsilon is in the statistics.
        let norm = NormKernel { tokens: x.rows, width: site.input_cols(2), kind: self.kind, eps: 0.0 };
        norm.check()?;
        site.workspace(norm.backward_workspace_bytes(site.device()));
        Ok(Box::new(move |step| {
            let operands = NormBackward {
                dy: dy.all(),
                dresidual: dresidual.as_ref().map(Matrix::all),
                x: x.all(),
                stats: &stats,
                gain: gain.as_ref(),
                residual: residual.as_ref().map(|residual| residual.operands(step, &dx)),
                dx: dx.all(),
                dgain: dgain.as_ref(),
                dbias: dbias.as_ref(),
                accumulate: Some(step.accumulate),
            };
            let packed = step.rows(&live);
            norm.backward(step.stream, packed, &operands, step.workspace)
        }))
    }
}
