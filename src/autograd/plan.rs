//! Liveness of a recorded step: when each tensor is needed last, what can be left out, and how
//! much memory the step holds at its peak.

use super::graph::{Graph, Kind, Tensor};
use super::op::Workload;

/// Which nodes run, and after which node each tensor is free.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Indices of the nodes to run, in order.
    pub order: Vec<usize>,
    /// For each position in `order`, the activations that are free afterwards.
    pub(crate) free_after: Vec<Vec<Tensor>>,
    /// For each position in `order`, whether operand 0 has its last use there.
    pub(crate) last_use_of_first: Vec<bool>,
    /// For each position in `order` and each result, whether somebody reads it; an optional result
    /// that nobody reads is neither allocated nor computed.
    pub(crate) read: Vec<Vec<bool>>,
    /// Most elements of activations that are held at one time.
    pub peak_elements: usize,
}

impl Plan {
    /// Plans `graph`: drops nodes whose results nobody reads, then finds every last use.
    pub fn new(graph: &Graph) -> Self {
        let mut needed = vec![false; graph.tensors.len()];
        for tensor in &graph.kept {
            needed[tensor.0] = true;
        }
        let mut order = Vec::new();
        for (i, node) in graph.nodes.iter().enumerate().rev() {
            let useful = node
                .outputs
                .iter()
                .flatten()
                .any(|t| needed[t.0] || matches!(graph.info(*t).kind, Kind::Gradient(_)));
            if useful {
                order.push(i);
                for input in node.inputs.iter().flatten() {
                    needed[input.0] = true;
                }
            }
        }
        order.reverse();
        let read: Vec<Vec<bool>> = order
            .iter()
            .map(|&i| {
                let node = &graph.nodes[i];
                let wanted = |(k, t): (usize, &Option<Tensor>)| {
                    t.is_some_and(|t| {
                        needed[t.0] || !node.op.optional(k) || matches!(graph.info(t).kind, Kind::Gradient(_))
                    })
                };
                node.outputs.iter().enumerate().map(wanted).collect()
            })
            .collect();
        let results = |at: usize| {
            let node = &graph.nodes[order[at]];
            node.outputs.iter().zip(&read[at]).filter_map(|(t, read)| t.filter(|_| *read))
        };

        let mut last_use = vec![None; graph.tensors.len()];
        for (at, &i) in order.iter().enumerate() {
            let node = &graph.nodes[i];
            for tensor in node.inputs.iter().flatten().copied().chain(results(at)) {
                last_use[tensor.0] = Some(at);
            }
        }
        let mut free_after = vec![Vec::new(); order.len()];
        for (i, at) in last_use.iter().enumerate() {
            let tensor = Tensor(i);
            if let Some(at) = at
                && graph.info(tensor).kind == Kind::Activation
                && !graph.kept.contains(&tensor)
            {
                free_after[*at].push(tensor);
            }
        }
        let last_use_of_first: Vec<bool> = order
            .iter()
            .enumerate()
            .map(|(at, &i)| {
                let (first, others) = match graph.nodes[i].inputs.split_first() {
                    Some((Some(first), others)) => (*first, others),
                    _ => return false,
                };
                free_after[at].contains(&first) && !others.contains(&Some(first))
            })
            .collect();

        let mut live = 0;
        let mut peak_elements = 0;
        for (at, &i) in order.iter().enumerate() {
            let node = &graph.nodes[i];
            for tensor in results(at) {
                if graph.info(tensor).kind == Kind::Activation {
                    live += graph.info(tensor).len();
                }
            }
            let moved = node.op.in_place() && last_use_of_first[at];
            if moved {
                live -= graph.info(node.input(0)).len();
            }
            peak_elements = peak_elements.max(live);
            for tensor in &free_after[at] {
                if !(moved && Some(*tensor) == node.inputs[0]) {
                    live -= graph.info(*tensor).len();
                }
            }
        }
        Self { free_after, last_use_of_first, peak_elements, read, order }
    }

    /// Arithmetic of the planned nodes of `graph`, as [`Graph::flops`] counts all.
    pub fn flops(&self, graph: &Graph, work: &Workload) -> f64 {
        self.order.iter().map(|&index| graph.node_flops(&graph.nodes[index], work)).sum()
    }
}
