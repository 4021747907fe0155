//! Sums of whole tensors, where gradients meet; GELU by itself, where it is recomputed.

use std::sync::Arc;

use super::device::{Element, Launch, Site};
use super::gemm;
use super::graph::{Graph, Node, Pass, Tensor};
use super::op::{Io, Op, on_cpu};
use crate::cpu;
use crate::error::Result;
use crate::kernels::elementwise::{
    Add as AddKernel, Addend, Gelu as GeluKernel, accumulate as accumulate_kernel, accumulate_f32,
};
use crate::recipe::GeluKind;

/// `a + b`; the sum takes over the memory of `a` where it can.
pub fn add(graph: &mut Graph, a: Tensor, b: Tensor) -> Tensor {
    let sum = graph.activation_like(a);
    graph.record(Add, vec![Some(a), Some(b)], vec![Some(sum)]);
    sum
}

/// Adds `grad` to the gradient accumulator of the parameter `tensor`.
pub(super) fn accumulate(graph: &mut Graph, tensor: Tensor, grad: Tensor) {
    let target = graph.gradient_of(tensor);
    graph.record(Accumulate, vec![Some(grad)], vec![target]);
}

#[derive(Debug)]
pub(super) struct Add;

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::elementwise::add(a.output(0), a.input(1)));
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (a, b, out) = (site.input(0)?, site.input(1)?, site.output(0)?);
        Ok(Box::new(move |step| {
            let add = AddKernel { rows: a.rows, width: a.cols };
            let live = step.live(&a);
            add.launch(step.stream, Some(&out.buffer), &a.buffer, Addend::Rows(&b.buffer), live)
        }))
    }

    fn backward(&self, _: &mut Graph, _: &super::Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        vec![grads[0], grads[0]]
    }
}

#[derive(Debug)]
struct Accumulate;

impl Op for Accumulate {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::elementwise::add(a.output(0), a.input(0)));
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let out = site.output_f32(0)?;
        let out = site.present(out)?;
        if site.input_element(0) == Element::F32 {
            let x = site.input_f32(0)?;
            let x = site.present(x)?;
            return Ok(Box::new(move |step| accumulate_f32(step.stream, &out, &x, Some(step.accumulate))));
        }
        let x = site.input(0)?;
        Ok(Box::new(move |step| accumulate_kernel(step.stream, &out, &x.buffer, Some(step.accumulate))))
    }
}

/// `x[m, D] + row[1, D]`, the row added to every row of `x`.
pub fn add_row(graph: &mut Graph, x: Tensor, row: Tensor) -> Tensor {
    let sum = graph.activation_like(x);
    graph.record(AddRow, vec![Some(x), Some(row)], vec![Some(sum)]);
    sum
}

#[derive(Debug)]
struct AddRow;

impl Op for AddRow {
    fn name(&self) -> &'static str {
        "add row"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::elementwise::add_row(a.output(0), a.input(1)));
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (x, row, out) = (site.input(0)?, site.input_f32(1)?, site.output(0)?);
        let row = site.present(row)?;
        Ok(Box::new(move |step| {
            let add = AddKernel { rows: x.rows, width: x.cols };
            let live = step.live(&x);
            add.launch(step.stream, Some(&out.buffer), &x.buffer, Addend::Row(&row), live)
        }))
    }

    fn backward(
        &self,
        graph: &mut Graph,
        node: &super::Node,
        grads: &[Option<Tensor>],
    ) -> Vec<Option<Tensor>> {
        let Some(dout) = grads[0] else { return vec![None; 2] };
        if let Some(drow) = graph.gradient_of(node.input(1)) {
            graph.record(SumRows, vec![Some(dout)], vec![Some(drow)]);
        }
        vec![Some(dout), None]
    }
}

/// Adds the column sums to a parameter's gradient.
#[derive(Debug)]
struct SumRows;

impl Op for SumRows {
    fn name(&self) -> &'static str {
        "d add row"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::gemm::bias_grad(a.output(0), a.input(0)));
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        gemm::prepare_column_sums(site)
    }
}

/// The node that makes `y = gelu(pre)` where a linear layer has made both.
pub(super) fn gelu_again(kind: GeluKind, pre: Option<Tensor>, y: Option<Tensor>) -> Node {
    Node { op: Arc::new(Gelu(kind)), inputs: vec![pre], outputs: vec![y], pass: Pass::Again }
}

/// `y = gelu(x)` elementwise. Only the backward pass records it, so it has no rule.
#[derive(Debug)]
struct Gelu(GeluKind);

impl Op for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn result(&self, _: usize) -> &'static str {
        "GELU"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| cpu::gemm::gelu(a.output(0), a.input(0), self.0));
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        let (x, y) = (site.input(0)?, site.output(0)?);
        let gelu = GeluKernel { rows: x.rows, width: x.cols, kind: self.0 };
        Ok(Box::new(move |step| gelu.launch(step.stream, &y.buffer, &x.buffer, step.live(&x))))
    }
}
