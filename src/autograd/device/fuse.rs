//! Nodes that are one launch on a device: what passes between them never leaves the registers.

use std::sync::Arc;

use super::super::elementwise::Add;
use super::super::gemm::{BiasGrad, GeluGrad, InputGeluGrad, InputGrad, Linear, LinearResidual};
use super::super::graph::{Graph, Node, Tensor};
use super::super::norm::NormGrad;
use super::super::op::{Op, downcast};
use super::super::position::{AddPosition, Fourier, Table};
use super::super::residual::{Residual, ResidualGrad};
use super::super::sharded::ColumnLinearGrad;

/// The graph as a device runs it. It computes the same.
pub fn fused(graph: &Graph) -> Graph {
    let mut graph = graph.clone();
    gelu_grad(&mut graph);
    sharded_gelu_grad(&mut graph);
    residual(&mut graph);
    norm_grad(&mut graph);
    residual_grad(&mut graph);
    position(&mut graph);
    graph
}

/// The node before `at` that makes `tensor`, where it is a `T` and nobody but node `at` reads the tensor, apart
/// from nodes after it where `later` says so.
fn producer<T: Op>(graph: &Graph, tensor: Tensor, at: usize, later: bool) -> Option<usize> {
    let reads = |node: &Node| node.inputs.contains(&Some(tensor));
    let product = graph.nodes[..at].iter().rposition(|node| node.outputs.contains(&Some(tensor)))?;
    downcast::<T>(&graph.nodes[product])?;
    let read_before = graph.nodes[..at].iter().any(reads);
    let read_after = graph.nodes[at + 1..].iter().any(reads) || graph.kept.contains(&tensor);
    (!read_before && (later || !read_after)).then_some(product)
}

/// Node `at` as another operation.
fn replace(
    graph: &mut Graph,
    at: usize,
    op: impl Op + 'static,
    inputs: Vec<Option<Tensor>>,
    outputs: Vec<Option<Tensor>>,
) {
    let pass = graph.nodes[at].pass;
    graph.nodes[at] = Node { op: Arc::new(op), inputs, outputs, pass };
}

/// Leaves out the nodes of `gone`, ascending.
fn remove(graph: &mut Graph, gone: &[usize]) {
    let mut index = 0;
    graph.nodes.retain(|_| {
        index += 1;
        gone.binary_search(&(index - 1)).is_err()
    });
}

/// `d linear/x`, `d gelu` and the `d linear/b` that follows.
fn gelu_grad(graph: &mut Graph) {
    let mut gone = Vec::new();
    for at in 0..graph.nodes.len() {
        let node = &graph.nodes[at];
        let Some(&GeluGrad(kind)) = downcast(node) else { continue };
        let (dy, pre, dpre) = (node.input(0), node.input(1), node.output(0));
        let Some(product) = producer::<InputGrad>(graph, dy, at, false) else { continue };
        let sums = |node: &Node| downcast::<BiasGrad>(node).is_some() && node.inputs[0] == Some(dpre);
        let sums = graph.nodes[at..].iter().position(sums).map(|sums| at + sums);
        let factors = &graph.nodes[product].inputs;
        let inputs = vec![Some(pre), factors[0], factors[1]];
        let outputs = vec![Some(dpre), sums.map(|sums| graph.nodes[sums].output(0))];
        gone.push(product);
        gone.extend(sums);
        replace(graph, at, InputGeluGrad(kind), inputs, outputs);
    }
    gone.sort_unstable();
    remove(graph, &gone);
}

/// `d column linear` and the `d gelu` of one of its results.
fn sharded_gelu_grad(graph: &mut Graph) {
    let mut gone = Vec::new();
    for at in 0..graph.nodes.len() {
        let node = &graph.nodes[at];
        let Some(&GeluGrad(kind)) = downcast(node) else { continue };
        let (dy, pre, dpre) = (node.input(0), node.input(1), node.output(0));
        let Some(product) = producer::<ColumnLinearGrad>(graph, dy, at, false) else { continue };
        let mut fused = graph.nodes[product].clone();
        let Some(part) = fused.outputs.iter().position(|output| *output == Some(dy)) else { continue };
        let Some(ColumnLinearGrad { shard, gelu }) = downcast(&fused) else { continue };
        let (shard, mut gelu) = (*shard, gelu.clone());
        gelu[part / 3] = Some(kind);
        (fused.outputs[part], fused.inputs[part + 3]) = (Some(dpre), Some(pre));
        fused.op = Arc::new(ColumnLinearGrad { shard, gelu });
        graph.nodes[product] = fused;
        gone.push(at);
    }
    remove(graph, &gone);
}

/// `linear` and the `residual` that adds its result; the result itself is still there for the gradient of a
/// LayerScale.
fn residual(graph: &mut Graph) {
    let mut gone = Vec::new();
    for at in 0..graph.nodes.len() {
        let node = &graph.nodes[at];
        let Some(&Residual { drop_path, .. }) = downcast(node) else { continue };
        let (x, branch, gamma, out) = (node.inputs[0], node.input(1), node.inputs[2], node.outputs[0]);
        let Some(product) = producer::<Linear>(graph, branch, at, true) else { continue };
        let factors = &graph.nodes[product].inputs;
        let inputs = vec![x, factors[0], factors[1], factors[2], gamma];
        let outputs = vec![out, Some(branch)];
        gone.push(product);
        replace(graph, at, LinearResidual(drop_path), inputs, outputs);
    }
    gone.sort_unstable();
    remove(graph, &gone);
}

/// `d norm` and the `add` of the gradient that passes by the norm.
fn norm_grad(graph: &mut Graph) {
    let mut gone = Vec::new();
    for at in 0..graph.nodes.len() {
        let node = &graph.nodes[at];
        if downcast::<Add>(node).is_none() || node.inputs[0] == node.inputs[1] {
            continue;
        }
        let (passing, dx, sum) = (node.inputs[0], node.input(1), node.outputs[0]);
        let Some(grad) = producer::<NormGrad>(graph, dx, at, false) else { continue };
        let Some(&NormGrad { kind, adds: false, residual: None }) = downcast(&graph.nodes[grad]) else {
            continue;
        };
        let mut fused = graph.nodes[grad].clone();
        (fused.inputs[0], fused.outputs[0]) = (passing, sum);
        gone.push(grad);
        replace(graph, at, NormGrad { kind, adds: true, residual: None }, fused.inputs, fused.outputs);
    }
    gone.sort_unstable();
    remove(graph, &gone);
}

/// `d norm` and the `d residual` of the connection before the norm, which then stands in the place of the former:
/// only where its operands are there by then, so not where the branch is recomputed in between. Where two branches
/// were added to one stream, the gradient of one.
fn residual_grad(graph: &mut Graph) {
    let mut gone = Vec::new();
    for at in 0..graph.nodes.len() {
        let node = &graph.nodes[at];
        let Some(&residual) = downcast::<ResidualGrad>(node) else { continue };
        let makes = |tensor: Option<Tensor>| {
            move |node: &Node| tensor.is_some_and(|_| node.outputs.contains(&tensor))
        };
        let Some(grad) = graph.nodes[..at].iter().rposition(makes(node.inputs[0])) else { continue };
        let product = &graph.nodes[grad];
        let Some(&NormGrad { kind, adds, residual: None }) = downcast(product) else { continue };
        let late = node.inputs[1..].iter().any(|operand| graph.nodes[grad..at].iter().any(makes(*operand)));
        if late || product.outputs[0] != node.inputs[0] {
            continue;
        }
        let inputs = product.inputs.iter().chain(&node.inputs[1..]).copied().collect();
        let outputs = product.outputs.iter().chain(&node.outputs).copied().collect();
        gone.push(at);
        replace(graph, grad, NormGrad { kind, adds, residual: Some(residual) }, inputs, outputs);
    }
    remove(graph, &gone);
}

/// A position embedding and the `add` that brings it to the tokens.
fn position(graph: &mut Graph) {
    let mut gone = Vec::new();
    for at in 0..graph.nodes.len() {
        let node = &graph.nodes[at];
        if downcast::<Add>(node).is_none() || node.inputs[0] == node.inputs[1] {
            continue;
        }
        let (x, embedding, sum) = (node.inputs[0], node.input(1), node.outputs[0]);
        let table = producer::<Table>(graph, embedding, at, false);
        let Some(made) = table.or_else(|| producer::<Fourier>(graph, embedding, at, false)) else { continue };
        let node = &graph.nodes[made];
        let added = match (downcast::<Table>(node), downcast::<Fourier>(node)) {
            (Some(table), _) => AddPosition::Table(table.clone()),
            (_, Some(fourier)) => AddPosition::Fourier(fourier.clone()),
            _ => continue,
        };
        let inputs = [x].iter().chain(&node.inputs).copied().collect();
        gone.push(made);
        replace(graph, at, added, inputs, vec![sum]);
    }
    gone.sort_unstable();
    remove(graph, &gone);
}
