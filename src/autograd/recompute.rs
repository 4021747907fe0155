//! Selective recomputation: what is cheap to compute again is not kept between forward and backward pass.
//!
//! | result | made again from | which is kept for |
//! |---|---|---|
//! | a norm, and its statistics | its operand | the gradient of the norm |
//! | GELU of a linear layer | the pre-activation | the slope of GELU |
//!
//! The idea is that of Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models"), whose
//! choice was the probabilities of attention; those are never kept here. What an op answers to
//! [`Op::recompute`](super::Op::recompute) is recorded before the first node of the backward pass that reads the result, and
//! stays until the last one. In a serial block each result has one reader. In a parallel block the gradients of two weights
//! read the same norm, with the gradient of attention between them: it is made once and held meanwhile. GELU, which is
//! wider, has just gone then, so a second pass over memory would save nothing at the peak.
//!
//! A locked tower has no gradients, an evaluation no backward pass: nothing is recomputed there.

use std::collections::HashMap;

use super::graph::{Graph, Node, Tensor};

impl Graph {
    /// Lets the nodes from `first` on, the backward pass, read copies of cheap results that are made among them.
    pub(super) fn recompute_from(&mut self, first: usize) {
        let backward = self.nodes.split_off(first);
        let again = self.cheap_results();
        let mut copies: HashMap<Tensor, Tensor> = HashMap::new();
        for mut node in backward {
            for input in node.inputs.iter_mut().flatten() {
                if let Some(cheap) = again.get(input).filter(|_| !copies.contains_key(input)) {
                    let copy = self.record_again(std::slice::from_ref(cheap));
                    let results = cheap.outputs.iter().zip(&copy[0].outputs);
                    copies.extend(results.filter_map(|(of, copy)| of.zip(*copy)));
                }
                *input = *copies.get(input).unwrap_or(input);
            }
            self.nodes.push(node);
        }
    }

    /// The node that makes each cheap result again.
    fn cheap_results(&self) -> HashMap<Tensor, Node> {
        let mut again = HashMap::new();
        for node in &self.nodes {
            for (i, result) in node.outputs.iter().enumerate() {
                if let Some((result, cheap)) = result.zip(node.op.recompute(node, i)) {
                    again.insert(result, cheap);
                }
            }
        }
        again
    }
}
