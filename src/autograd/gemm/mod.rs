//! Linear layers with fused bias and GELU.
//!
//! | op | result |
//! |---|---|
//! | linear | `y = x wᵀ + b` |
//! | linear+gelu | `y = gelu(x wᵀ + b)`, the pre-activation kept for the rule |
//!
//! Rules: `dx = dy w`, `dw += dyᵀ x`, `db += Σ dy`; through GELU `dpre = dy ⊙ gelu'(pre)` first. On a device
//! `dy w` of the layer after and `⊙ gelu'(pre)` are one launch, and so are a layer and the residual connection
//! that adds its result.

mod fused;

pub(super) use fused::{InputGeluGrad, LinearResidual};

use super::device::{Launch, Matrix, Site};
use super::elementwise::gelu_again;
use super::graph::{Graph, Node, Tensor};
use super::op::{Io, Op, Workload, on_cpu};
use crate::cpu;
use crate::error::{Error, Result};
use crate::kernels::gemm::{
    BiasGrad as BiasGradKernel, Epilogue, Finish, Gemm, Layout, Matrix as Operand, Plan, Shape, Store, Sum,
    Vector, plan, raw,
};
use crate::recipe::GeluKind;

/// `x[m, in] · w[out, in]ᵀ + bias[out]`.
pub fn linear(graph: &mut Graph, x: Tensor, weight: Tensor, bias: Option<Tensor>) -> Tensor {
    let y = result(graph, x, weight);
    graph.record(Linear, vec![Some(x), Some(weight), bias], vec![Some(y)]);
    y
}

/// `gelu(x · wᵀ + bias)` in one pass.
pub fn linear_gelu(
    graph: &mut Graph,
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    kind: GeluKind,
) -> Tensor {
    let y = result(graph, x, weight);
    let pre = graph.activation_like(y);
    graph.record(LinearGelu(kind), vec![Some(x), Some(weight), bias], vec![Some(y), Some(pre)]);
    y
}

fn result(graph: &mut Graph, x: Tensor, weight: Tensor) -> Tensor {
    let (inner, outer) = (graph.info(weight).cols, graph.info(weight).rows);
    let info = graph.info(x);
    let (rows, cols, extent) = (info.rows, info.cols, info.extent);
    assert_eq!(cols, inner, "linear: {} columns meet a weight of {inner}", cols);
    graph.activation(rows, outer, extent)
}

/// `2 · rows · in · out`, shared by the forward op and its two gradients.
fn product_flops(graph: &Graph, rows_of: Tensor, weight: Tensor, work: &Workload) -> f64 {
    let w = graph.info(weight);
    2.0 * work.rows(graph.info(rows_of)) * w.len() as f64
}

/// Records `dx`, `dw`, `db` of a linear layer from the gradient of its result.
fn linear_rule(graph: &mut Graph, node: &Node, dy: Tensor) -> Vec<Option<Tensor>> {
    let (x, weight) = (node.input(0), node.input(1));
    if let Some(dw) = graph.gradient_of(weight) {
        graph.record(WeightGrad, vec![Some(dy), Some(x)], vec![Some(dw)]);
    }
    if let Some(db) = node.inputs[2].and_then(|b| graph.gradient_of(b)) {
        graph.record(BiasGrad, vec![Some(dy)], vec![Some(db)]);
    }
    let dx = graph.info(x).requires_grad.then(|| {
        let dx = graph.activation_like(x);
        graph.record(InputGrad, vec![Some(dy), Some(weight)], vec![Some(dx)]);
        dx
    });
    vec![dx, None, None]
}

/// What a weight is rounded up to, so that rows are whole 16 bytes whichever way it is multiplied.
pub(super) const WEIGHT_UNIT: [usize; 2] = [8, 8];
/// And a bias.
pub(super) const BIAS_UNIT: [usize; 2] = [1, 8];

/// The same of an operand of a linear layer.
fn padding(i: usize) -> [usize; 2] {
    match i {
        1 => WEIGHT_UNIT,
        2 => BIAS_UNIT,
        _ => [1, 1],
    }
}

/// The plan of a product, for which the workspace is made large enough.
pub(super) fn planned(site: &mut Site<'_>, shape: Shape, finish: Finish, column_sums: bool) -> Result<Plan> {
    let info = site.device().info();
    let Some(plan) = plan(shape, finish, info) else {
        return Err(Error::failure(format!(
            "{} has {} bytes of shared memory for a block, which hold no tile of a product; use --device cpu",
            info.name, info.shared_per_block
        )));
    };
    site.workspace(raw::workspace_bytes(&plan, finish.kind, shape.m, shape.n, column_sums));
    Ok(plan)
}

/// `out = gelu(x wᵀ + bias)`, GELU where there is one.
fn prepare_store(site: &mut Site<'_>, gelu: Option<GeluKind>) -> Result<Launch> {
    let (x, w, out) = (site.input(0)?, site.input(1)?, site.output(0)?);
    let (bias, pre) = (site.input_f32(2)?, if gelu.is_some() { site.output_opt(1)? } else { None });
    let shape = Shape { layout: Layout::Nt, m: x.rows, n: w.rows, k: x.cols };
    let plan = planned(site, shape, Finish::store(gelu.is_some(), pre.is_some(), false), false)?;
    Ok(Box::new(move |step| {
        let mut store = Store::plain(out.operand());
        store.bias = bias.as_ref().map_or(Vector::none(), Vector::from);
        store.gelu = gelu;
        store.pre = pre.as_ref().map_or(Operand::none(), Matrix::operand);
        let product =
            Gemm { shape, a: x.operand(), b: w.operand(), live: step.live_rows(&x), dependent: false };
        product.launch(step.stream, &Epilogue::Store(store), &plan, &Vector::from(step.workspace))
    }))
}

/// Column sums of operand 0, added to result 0.
pub(super) fn prepare_column_sums(site: &mut Site<'_>) -> Result<Launch> {
    let dy = site.input(0)?;
    let out = site.output_f32(0)?;
    let out = site.present(out)?;
    site.workspace(raw::bias_grad_workspace_bytes(dy.rows, dy.cols));
    Ok(Box::new(move |step| {
        let sums = BiasGradKernel {
            dy: dy.operand(),
            m: dy.rows,
            n: dy.cols,
            live: step.live_rows(&dy),
            out: Vector::from(&out),
            accumulate: Vector::from(step.accumulate),
        };
        sums.launch(step.stream, &Vector::from(step.workspace))
    }))
}

#[derive(Debug)]
pub(super) struct Linear;

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (outer, inner) = a.input_shape(1);
            cpu::gemm::linear(a.output(0), a.input(0), a.input(1), a.input_opt(2), inner, outer);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        prepare_store(site, None)
    }

    fn multiples(&self, i: usize) -> [usize; 2] {
        padding(i)
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        grads[0].map_or(vec![None; 3], |dy| linear_rule(graph, node, dy))
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        product_flops(graph, node.input(0), node.input(1), work)
    }
}

#[derive(Debug)]
struct LinearGelu(GeluKind);

impl Op for LinearGelu {
    fn name(&self) -> &'static str {
        "linear+gelu"
    }

    /// The pre-activation serves the backward rule alone.
    fn optional(&self, i: usize) -> bool {
        i == 1
    }

    fn recompute(&self, node: &Node, i: usize) -> Option<Node> {
        (i == 0).then(|| gelu_again(self.0, node.outputs[1], node.outputs[0]))
    }

    fn result(&self, i: usize) -> &'static str {
        ["GELU", "pre-activations"][i]
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (outer, inner) = a.input_shape(1);
            let (y, pre) = (a.output(0), a.output_opt(1));
            let bias = a.input_opt(2);
            cpu::gemm::linear_gelu(y, pre, a.input(0), a.input(1), bias, inner, outer, self.0);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        prepare_store(site, Some(self.0))
    }

    fn multiples(&self, i: usize) -> [usize; 2] {
        padding(i)
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        let Some(dy) = grads[0] else { return vec![None; 3] };
        let dpre = graph.activation_like(dy);
        graph.record(GeluGrad(self.0), vec![Some(dy), node.outputs[1]], vec![Some(dpre)]);
        linear_rule(graph, node, dpre)
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        product_flops(graph, node.input(0), node.input(1), work)
    }
}

#[derive(Debug)]
pub(super) struct GeluGrad(pub GeluKind);

impl Op for GeluGrad {
    fn name(&self) -> &'static str {
        "d gelu"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::gemm::gelu_grad(a.output(0), a.input(1), self.0));
    }
}

#[derive(Debug)]
pub(super) struct InputGrad;

impl Op for InputGrad {
    fn name(&self) -> &'static str {
        "d linear/x"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (outer, inner) = a.input_shape(1);
            cpu::gemm::linear_input_grad(a.output(0), a.input(0), a.input(1), inner, outer);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (dy, w, dx) = (site.input(0)?, site.input(1)?, site.output(0)?);
        let shape = Shape { layout: Layout::Nn, m: dy.rows, n: w.cols, k: dy.cols };
        let plan = planned(site, shape, Finish::store(false, false, false), false)?;
        Ok(Box::new(move |step| {
            let product =
                Gemm { shape, a: dy.operand(), b: w.operand(), live: step.live_rows(&dy), dependent: false };
            let store = Epilogue::Store(Store::plain(dx.operand()));
            product.launch(step.stream, &store, &plan, &Vector::from(step.workspace))
        }))
    }

    fn multiples(&self, i: usize) -> [usize; 2] {
        padding(i)
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        product_flops(graph, node.input(0), node.input(1), work)
    }
}

#[derive(Debug)]
struct WeightGrad;

impl Op for WeightGrad {
    fn name(&self) -> &'static str {
        "d linear/w"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let (outer, inner) = (a.input_shape(0).1, a.input_shape(1).1);
            cpu::gemm::linear_weight_grad(a.output(0), a.input(0), a.input(1), inner, outer);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (dy, x) = (site.input(0)?, site.input(1)?);
        let dw = site.output_f32(0)?;
        let dw = site.present(dw)?;
        let shape = Shape { layout: Layout::Tn, m: dy.cols, n: x.cols, k: dy.rows };
        let plan = planned(site, shape, Finish::sum(), false)?;
        let squares = site.squares(0, raw::square_sums(&plan, shape.m, shape.n));
        Ok(Box::new(move |step| {
            let product =
                Gemm { shape, a: dy.operand(), b: x.operand(), live: step.live_rows(&dy), dependent: false };
            let sum = Epilogue::Sum(Sum {
                out: Operand::of(&dw, 0, shape.n),
                accumulate: Vector::from(step.accumulate),
                squares: squares.map_or(Vector::none(), |first| Vector::of(step.squares, first)),
            });
            product.launch(step.stream, &sum, &plan, &Vector::from(step.workspace))
        }))
    }

    fn flops(&self, graph: &Graph, node: &Node, work: &Workload) -> f64 {
        product_flops(graph, node.input(0), node.output(0), work)
    }
}

#[derive(Debug)]
pub(super) struct BiasGrad;

impl Op for BiasGrad {
    fn name(&self) -> &'static str {
        "d linear/b"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::gemm::bias_grad(a.output(0), a.input(0)));
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        prepare_column_sums(site)
    }
}
