//! Nodes that are one launch on a device.

use std::any::Any;

use super::super::gemm::{BiasGrad, GeluGrad, InputGeluGrad, InputGrad};
use super::super::graph::{Graph, Node, Tensor};

fn is<T: 'static>(node: &Node) -> bool {
    let op: &dyn Any = node.op.as_ref();
    op.is::<T>()
}

/// Replaces `d linear/x`, `d gelu` and the `d linear/b` that follows by one node: the gradient between the
/// first two never leaves the registers.
pub(super) fn gelu_grad(graph: &mut Graph) {
    let mut replaced: Vec<Option<Node>> = graph.nodes.iter().cloned().map(Some).collect();
    for at in 0..graph.nodes.len() {
        let node = &graph.nodes[at];
        let op: &dyn Any = node.op.as_ref();
        let Some(&GeluGrad(kind)) = op.downcast_ref::<GeluGrad>() else { continue };
        let (dy, pre, dpre) = (node.input(0), node.input(1), node.output(0));
        let Some(product) = graph.nodes[..at].iter().rposition(|n| n.outputs.contains(&Some(dy))) else {
            continue;
        };
        if !is::<InputGrad>(&graph.nodes[product]) || graph.kept.contains(&dy) || readers(graph, dy) > 1 {
            continue;
        }
        let sums = graph.nodes[at..].iter().position(|n| is::<BiasGrad>(n) && n.inputs[0] == Some(dpre));
        let bias_grad = sums.and_then(|sums| replaced[at + sums].take()).map(|node| node.output(0));
        let inputs = vec![Some(pre), graph.nodes[product].inputs[0], graph.nodes[product].inputs[1]];
        let outputs = vec![Some(dpre), bias_grad];
        replaced[product] = None;
        replaced[at] = Some(Node { op: std::sync::Arc::new(InputGeluGrad(kind)), inputs, outputs });
    }
    graph.nodes = replaced.into_iter().flatten().collect();
}

fn readers(graph: &Graph, tensor: Tensor) -> usize {
    graph.nodes.iter().filter(|node| node.inputs.contains(&Some(tensor))).count()
}
