//! Products that take along what stands beside them in the record: what a device makes of two or three nodes.

use super::super::device::{Launch, Matrix, Site};
use super::super::graph::{Graph, Node};
use super::super::op::{Io, Op, Workload, on_cpu};
use super::super::residual::{DropPath, keep};
use super::super::split::Shard;
use super::{padding, planned, product_flops};
use crate::cpu;
use crate::error::Result;
use crate::kernels::gemm::{
    Epilogue, Finish, GeluGrad, Gemm, Layout, Matrix as Operand, Shape, Store, Vector,
};
use crate::recipe::GeluKind;

/// `dpre = (dy w) ⊙ gelu'(pre)` in the place of `pre`, and where wanted `db += Σ dpre`.
#[derive(Debug)]
pub(in crate::autograd) struct InputGeluGrad(pub GeluKind);

impl Op for InputGeluGrad {
    fn name(&self) -> &'static str {
        "d linear/x gelu"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (outer, inner) = a.input_shape(2);
            let (dpre, db) = (a.output(0), a.output_opt(1));
            let pre = dpre.to_vec();
            cpu::gemm::linear_input_grad(dpre, a.input(1), a.input(2), inner, outer);
            cpu::gemm::gelu_grad(dpre, &pre, self.0);
            if let Some(db) = db {
                cpu::gemm::bias_grad(db, dpre);
            }
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (pre, dy, w) = (site.input(0)?, site.input(1)?, site.input(2)?);
        let (dpre, db) = (site.output(0)?, site.output_f32(1)?);
        let shape = Shape { layout: Layout::Nn, m: dy.rows, n: w.cols, k: dy.cols };
        let plan = planned(site, shape, Finish::gelu_grad(), db.is_some())?;
        let gelu = self.0;
        Ok(Box::new(move |step| {
            let product =
                Gemm { shape, a: dy.operand(), b: w.operand(), live: step.live_rows(&dy), dependent: false };
            let end = Epilogue::GeluGrad(GeluGrad {
                out: dpre.operand(),
                pre: pre.operand(),
                gelu,
                bias_grad: db.as_ref().map_or(Vector::none(), Vector::from),
                accumulate: Vector::from(step.accumulate),
            });
            product.launch(step.stream, &end, &plan, &Vector::from(step.workspace))
        }))
    }

    fn multiples(&self, i: usize) -> [usize; 2] {
        if i == 2 { padding(1) } else { [1, 1] }
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        product_flops(graph, node.input(1), node.input(2), work)
    }
}

/// `out = x + keep ⊙ gamma ⊙ (a wᵀ + bias)` in the place of `x`, and where wanted the product by itself.
#[derive(Debug)]
pub(in crate::autograd) struct LinearResidual(pub Option<DropPath>);

impl Op for LinearResidual {
    fn name(&self) -> &'static str {
        "linear+residual"
    }

    fn in_place(&self) -> bool {
        true
    }

    /// The product serves the backward rule alone.
    fn optional(&self, i: usize) -> bool {
        i == 1
    }

    fn result(&self, i: usize) -> &'static str {
        ["residual stream", "branches (LayerScale)"][i]
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (outer, inner) = a.input_shape(2);
            let keep = keep(self.0, Shard::WHOLE, a.batch, a.step);
            let (out, product) = (a.output(0), a.output_opt(1));
            let mut branch = out.to_vec();
            cpu::gemm::linear(&mut branch, a.input(1), a.input(2), a.input_opt(3), inner, outer);
            cpu::residual::forward(out, &branch, a.input_opt(4), keep.as_deref(), outer);
            if let Some(product) = product {
                product.copy_from_slice(&branch);
            }
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (x, a, w, out) = (site.input(0)?, site.input(1)?, site.input(2)?, site.output(0)?);
        let (bias, gamma, branch) = (site.input_f32(3)?, site.input_f32(4)?, site.output_opt(1)?);
        let dropped = self.0.map(|drop_path| site.drop_path(drop_path));
        let shape = Shape { layout: Layout::Nt, m: a.rows, n: w.rows, k: a.cols };
        let plan = planned(site, shape, Finish::store(false, false, true), false)?;
        Ok(Box::new(move |step| {
            let store = Store {
                out: out.operand(),
                bias: bias.as_ref().map_or(Vector::none(), Vector::from),
                gelu: None,
                pre: branch.as_ref().map_or(Operand::none(), Matrix::operand),
                residual: x.operand(),
                gamma: gamma.as_ref().map_or(Vector::none(), Vector::from),
                keep: dropped.map_or(Vector::none(), |branch| Vector::of(step.keep(), branch * shape.m)),
            };
            let product =
                Gemm { shape, a: a.operand(), b: w.operand(), live: step.live_rows(&a), dependent: false };
            product.launch(step.stream, &Epilogue::Store(store), &plan, &Vector::from(step.workspace))
        }))
    }

    fn multiples(&self, i: usize) -> [usize; 2] {
        if i > 0 { padding(i - 1) } else { [1, 1] }
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        product_flops(graph, node.input(1), node.input(2), work)
    }
}
