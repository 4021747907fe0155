//! What the activations of a step on a device are, by what made them.
//!
//! At the peak, as [`ArenaPlan`] lays them out: what the forward pass has left for the backward pass, what is made again,
//! and gradients.

use std::collections::{BTreeMap, HashSet};

use super::rank::RankStep;
use crate::autograd::Plan;
use crate::autograd::device::{ArenaPlan, fused};
use crate::autograd::graph::{Graph, Kind, Node, Pass, Tensor};

/// Activations of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// What they are.
    pub what: String,
    /// Bytes at the peak that the forward pass has made.
    pub kept: usize,
    /// Bytes at the peak that the backward pass has made.
    pub passing: usize,
    /// Bytes that the backward pass makes again, all in all.
    pub again: usize,
}

/// Kinds that hold less than this share of the peak are told together.
const SMALL: f64 = 0.01;
/// What these are.
const OTHER: &str = "other";
/// What ops call what goes from block to block.
const STREAM: &str = "residual stream";

/// All kinds, those that hold the most first; together they are the arena but for its gaps.
pub fn activations(rank: &RankStep) -> Vec<Held> {
    let graph = fused(rank.step.graph());
    let plan = Plan::new(&graph);
    let layout = ArenaPlan::new(&graph, &plan);
    let made = makers(&graph, &plan);
    let mut kinds: BTreeMap<String, Held> = BTreeMap::new();
    let peak = peak(&layout);
    for (tensor, interval) in &layout.held {
        let Some((what, pass)) = made[tensor.0].clone() else { continue };
        let held = kinds.entry(what.clone()).or_insert_with(|| Held { what, ..Held::default() });
        if (interval.first..=interval.last).contains(&peak) {
            match pass {
                Pass::Forward => held.kept += interval.bytes,
                Pass::Backward | Pass::Again => held.passing += interval.bytes,
            }
        }
        if pass == Pass::Again {
            held.again += interval.bytes;
        }
    }
    let least = SMALL * layout.peak as f64;
    let mut other = Held { what: OTHER.into(), ..Held::default() };
    let mut kinds: Vec<Held> = kinds.into_values().collect();
    kinds.retain(|kind| {
        let small = ((kind.kept + kind.passing).max(kind.again) as f64) < least;
        if small {
            other.kept += kind.kept;
            other.passing += kind.passing;
            other.again += kind.again;
        }
        !small
    });
    kinds.sort_by_key(|kind| std::cmp::Reverse((kind.kept, kind.passing)));
    kinds.push(other);
    kinds
}

/// The position in the order at which the most is held.
fn peak(layout: &ArenaPlan) -> usize {
    let starts = layout.held.iter().map(|(_, interval)| interval.first);
    let held = |at: usize| -> usize {
        let there = layout.held.iter().filter(|(_, interval)| (interval.first..=interval.last).contains(&at));
        there.map(|(_, interval)| interval.bytes).sum()
    };
    starts.max_by_key(|&at| held(at)).unwrap_or(0)
}

/// Of each tensor that a planned node makes, what it is, and in which part of the step it is made.
fn makers(graph: &Graph, plan: &Plan) -> Vec<Option<(String, Pass)>> {
    let nodes = || plan.order.iter().map(|&index| &graph.nodes()[index]);
    // What residual connections add to is the residual stream, whoever made it.
    let stream: HashSet<Tensor> =
        nodes().filter(|node| node.op.result(0) == STREAM).filter_map(|node| node.inputs[0]).collect();
    let mut made = vec![None; graph.tensors.len()];
    for node in nodes() {
        for (i, tensor) in node.outputs.iter().enumerate() {
            let Some(tensor) = tensor else { continue };
            let what = match node.pass {
                Pass::Backward => "gradients".into(),
                _ if stream.contains(tensor) => STREAM.into(),
                _ => result(graph, node, i),
            };
            made[tensor.0] = Some((what, node.pass));
        }
    }
    made
}

/// What result `i` of `node` is; of linear layers, whose.
fn result(graph: &Graph, node: &Node, i: usize) -> String {
    let what = node.op.result(i);
    if what != "linear" {
        return what.into();
    }
    let weight = node.inputs.iter().flatten().find_map(|tensor| match graph.info(*tensor).kind {
        Kind::Parameter(p) => graph.params()[p].name.strip_suffix(".weight"),
        _ => None,
    });
    let Some(name) = weight else { return what.into() };
    match name.split_once("blocks.").and_then(|(_, rest)| rest.split_once('.')) {
        Some((_, part)) => part.into(),
        None => name.into(),
    }
}
