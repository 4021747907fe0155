//! Reverse mode: walk the record backwards, let every op append its rule, add where gradients meet.

use std::collections::HashMap;

use super::elementwise;
use super::graph::{Graph, Kind, Node, Pass, Tensor, Tower};

impl Graph {
    /// Appends the backward pass. Each root is a tensor and the tensor that holds the gradient of
    /// the objective with respect to it. Gradients of parameters are added to their
    /// accumulators; the returned map holds those of other tensors that were reached.
    ///
    /// Segments are recorded a second time right before their backward rules: the same ops on the same inputs, so the
    /// recomputed values are bit-identical. Cheap results are recorded again where [`recompute_cheap`](Self::recompute_cheap)
    /// was called.
    pub fn backward(&mut self, roots: &[(Tensor, Tensor)]) -> HashMap<Tensor, Tensor> {
        self.pass = Pass::Backward;
        let recorded = self.nodes.len();
        let mut grads: HashMap<Tensor, Tensor> = HashMap::new();
        for (tensor, grad) in roots {
            self.accumulate(&mut grads, *tensor, *grad);
        }
        let segments = std::mem::take(&mut self.segments);
        let mut end = recorded;
        while end > 0 {
            let segment = segments.iter().find(|s| s.end == end && !s.is_empty());
            let start = segment.map_or(end - 1, |s| s.start);
            let nodes: Vec<Node> = self.nodes[start..end].to_vec();
            let reached = nodes.iter().any(|n| n.outputs.iter().flatten().any(|t| grads.contains_key(t)));
            if reached {
                let recomputed = segment.map(|_| self.record_again(&nodes));
                for (i, node) in nodes.iter().enumerate().rev() {
                    let seen_by_rule = recomputed.as_ref().map_or(node, |again| &again[i]);
                    self.apply_rule(&mut grads, node, seen_by_rule);
                }
            }
            end = start;
        }
        self.segments = segments;
        if self.selective {
            self.recompute_from(recorded);
        }
        self.pass = Pass::Forward;
        grads
    }

    /// Records copies of `nodes` whose activations are new tensors.
    pub(super) fn record_again(&mut self, nodes: &[Node]) -> Vec<Node> {
        let mut renamed: HashMap<Tensor, Tensor> = HashMap::new();
        let mut copies = Vec::with_capacity(nodes.len());
        for node in nodes {
            let inputs = node.inputs.iter().map(|t| t.map(|t| *renamed.get(&t).unwrap_or(&t))).collect();
            let mut outputs = Vec::with_capacity(node.outputs.len());
            for output in &node.outputs {
                outputs.push(output.map(|t| {
                    let copy = self.activation_like(t);
                    renamed.insert(t, copy);
                    copy
                }));
            }
            let copy = Node { op: node.op.clone(), inputs, outputs, pass: Pass::Again };
            self.record_node(copy.clone());
            copies.push(copy);
        }
        copies
    }

    fn apply_rule(&mut self, grads: &mut HashMap<Tensor, Tensor>, node: &Node, seen_by_rule: &Node) {
        let of_outputs: Vec<_> =
            node.outputs.iter().map(|t| t.and_then(|t| grads.get(&t).copied())).collect();
        let wanted = node.inputs.iter().flatten().any(|t| self.info(*t).requires_grad);
        if !wanted || of_outputs.iter().all(Option::is_none) {
            return;
        }
        let op = node.op.clone();
        self.begin_tower(Tower { modality: self.modality(node), frozen: false });
        let of_inputs = op.backward(self, seen_by_rule, &of_outputs);
        assert_eq!(of_inputs.len(), node.inputs.len(), "rule of {} answers for every operand", op.name());
        for (input, grad) in node.inputs.iter().zip(of_inputs) {
            if let (Some(input), Some(grad)) = (input, grad)
                && self.info(*input).requires_grad
            {
                self.accumulate(grads, *input, grad);
            }
        }
    }

    fn accumulate(&mut self, grads: &mut HashMap<Tensor, Tensor>, tensor: Tensor, grad: Tensor) {
        if let Kind::Parameter(_) = self.info(tensor).kind {
            elementwise::accumulate(self, tensor, grad);
        } else if let Some(previous) = grads.get(&tensor).copied() {
            let sum = elementwise::add(self, previous, grad);
            grads.insert(tensor, sum);
        } else {
            grads.insert(tensor, grad);
        }
    }
}
