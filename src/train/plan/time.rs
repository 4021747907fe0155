//! Predicted time of a step: what a cluster is stated to do, and what of the communication the schedules hide.
//!
//! * A node of the record takes its FLOPs on this rank, recomputation included, over the rate of a GPU. A node whose
//!   ranks compute together in K steps of a ring takes K·max(product, message) (`parallel::ring`): the larger of its
//!   product's time and K/(K − 1) of its messages'. On devices only the first product after a gathering and the last
//!   before a reduction overlap (`autograd::sharded::device`), which hides a little less.
//! * Of selective recomputation, which is no product, a node takes the bytes of its operands and results over the rate of
//!   a GPU's memory. Where blocks are recomputed their products count, and the rate of a GPU over a step has what lies
//!   between products in it.
//! * One channel carries weights and gradients of the data axis in the order in which the [`Schedule`] begins them.
//!   A visit waits for its weights, whose gathering began with the visit before; a reduction is waited for when the
//!   next one begins, and the last one at the end of the batch. So what is not hidden is the first gathering, the last
//!   reduction, and what takes longer than the block that it runs beside.
//! * An axis whose ranks are all in one node uses the link, else the network. The tensor axis is K neighbours, the data
//!   axis spans K·D.
//! * A step is its batches one after another, the sums over the tensor axis, and the update: at the rate of a GPU's
//!   memory 14 bytes for each element that the rank keeps (parameter, gradient, copy in bf16), and what the optimiser reads and
//!   writes beside them: AdamW 16, LAMB 28, SGD 8, Adafactor 8.
//! * MFU = model FLOPs of the step / (time · GPUs · peak), where model FLOPs are three times the forward pass's (Chowdhery
//!   et al. 2022, "PaLM").

use serde::Serialize;

use super::rank::{Pieces, RankStep};
use super::traffic::Traffic;
use crate::autograd::device::Element;
use crate::autograd::graph::{Graph, Kind, Node, Pass};
use crate::autograd::op::Workload;
use crate::parallel::zero::{Action, Schedule};
use crate::recipe::OptimizerKind;

/// Dense bf16 FLOP/s of an H100 or H200 with SXM socket (NVIDIA H100 Tensor Core GPU data sheet).
pub const PEAK: f64 = 989e12;
/// Share of the peak that a GPU is stated to reach over a step without communication: what large matrix products, short
/// attention and fused passes over memory add up to for ViT-L.
pub const SHARE: f64 = 0.6;
/// NVLink 4 of an H100: 900 GB/s, half of it in each direction.
pub const LINK: f64 = 450e9;
/// One 400 Gbit/s network adapter a GPU.
pub const NETWORK: f64 = 50e9;
/// Bytes a second of an H100's memory with SXM socket (the same data sheet).
pub const BANDWIDTH: f64 = 3.35e12;

/// What the GPUs and what connects them are stated to do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// Dense bf16 FLOP/s of a GPU at its peak.
    pub peak: f64,
    /// FLOP/s of a GPU over a step without communication.
    pub flops: f64,
    /// Bytes a second that a GPU reads and writes of its memory.
    pub bandwidth: f64,
    /// GPUs of a node.
    pub gpus_per_node: usize,
    /// Bytes a second that a GPU sends to others of its node.
    pub link: f64,
    /// Bytes a second that a GPU sends to other nodes.
    pub network: f64,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            peak: PEAK,
            flops: SHARE * PEAK,
            bandwidth: BANDWIDTH,
            gpus_per_node: 8,
            link: LINK,
            network: NETWORK,
        }
    }
}

impl Rates {
    /// Bytes a second within an axis that spans so many ranks.
    fn over(&self, span: usize) -> f64 {
        if span <= self.gpus_per_node { self.link } else { self.network }
    }
}

/// Seconds of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepTime {
    /// Products alone.
    pub compute: f64,
    /// Selective recomputation.
    pub passes: f64,
    /// What the tensor axis adds to them.
    pub tensor: f64,
    /// Waiting for the data axis.
    pub data: f64,
    /// The update, and sums before it.
    pub update: f64,
}

impl StepTime {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.compute + self.passes + self.tensor + self.data + self.update
    }

    /// Of `batches` batches a step on the first rank; `element` bytes are an element of activations and weights.
    pub fn of(rank: &RankStep, pieces: &Pieces, batches: usize, element: u64, rates: &Rates) -> Self {
        let (graph, order) = (rank.step.graph(), &rank.step.plan().order);
        let ranks = rank.tensor();
        let link = rates.over(ranks);
        let work = rank.workload();
        let selective = Again::of(rank).flops == 0.0;
        let nodes: Vec<[f64; 3]> = order
            .iter()
            .map(|&index| {
                let node = &graph.nodes()[index];
                let product = graph.node_flops(node, &work) / rates.flops;
                let sent = (element * node.op.sends(graph, node, 0)) as f64 / link;
                // Of nothing but messages none is hidden.
                let rings = if product > 0.0 { ranks as f64 / (ranks.max(2) - 1) as f64 } else { 1.0 };
                let pass = match node.pass {
                    Pass::Again if selective => moved(graph, node, &work) / rates.bandwidth,
                    _ => 0.0,
                };
                [product, pass, product.max(sent * rings) + pass]
            })
            .collect();
        let axis = rates.over(ranks * pieces.data());
        let gather = |visit: usize| {
            let unit = pieces.schedule.visits()[visit].unit;
            ((pieces.data() - 1) * pieces.piece(unit, 0)) as f64 * element as f64 / axis
        };
        let reduce = |unit: usize| {
            let len = pieces.units.units()[unit].len - pieces.piece(unit, 0);
            len as f64 * 4.0 / axis
        };
        let [compute, passes, busy] = [0, 1, 2].map(|i| nodes.iter().map(|node| node[i]).sum::<f64>());
        let length = timeline(&pieces.schedule, nodes.iter().map(|node| node[2]), gather, reduce);
        let times = batches as f64;
        let sums = Traffic::of(rank, pieces, batches, element).tensor_sums as f64 / link;
        Self {
            compute: times * compute,
            passes: times * passes,
            tensor: times * (busy - compute - passes),
            data: times * (length - busy).max(0.0),
            update: sums + update_bytes(rank.recipe.train.optimizer) * pieces.kept() as f64 / rates.bandwidth,
        }
    }
}

/// Bytes that an update moves for each element: parameter and gradient in f32, the copy in bf16, and what the optimiser
/// keeps; LAMB writes its update and reads it with the parameter again, Adafactor reads gradients twice.
fn update_bytes(optimizer: OptimizerKind) -> f64 {
    let of_optimizer = match optimizer {
        OptimizerKind::AdamW => 16,
        OptimizerKind::Lamb => 16 + 12,
        OptimizerKind::Sgd => 8,
        OptimizerKind::Adafactor => 4 + 4,
    };
    f64::from(14 + of_optimizer)
}

/// What the backward pass of a batch computes again, on one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Again {
    /// FLOPs of products.
    pub flops: f64,
    /// Bytes that everything else reads and writes.
    pub bytes: f64,
}

impl Again {
    /// Of a full batch of images of the expected size.
    pub fn of(rank: &RankStep) -> Self {
        let (graph, work) = (rank.step.graph(), rank.workload());
        let nodes = rank.step.plan().order.iter().map(|&index| &graph.nodes()[index]);
        nodes.filter(|node| node.pass == Pass::Again).fold(Self::default(), |sum, node| {
            match graph.node_flops(node, &work) {
                0.0 => Self { bytes: sum.bytes + moved(graph, node, &work), ..sum },
                flops => Self { flops: sum.flops + flops, ..sum },
            }
        })
    }
}

/// Bytes of the activations that a node reads and writes, its operands in bf16.
fn moved(graph: &Graph, node: &Node, work: &Workload) -> f64 {
    let work = work.of_modality(graph.modality(node));
    let elements = |tensor| {
        let info = graph.info(tensor);
        let counted = info.kind == Kind::Activation;
        if counted { work.rows(info) * info.cols as f64 } else { 0.0 }
    };
    let read: f64 = node.inputs.iter().flatten().map(|tensor| 2.0 * elements(*tensor)).sum();
    let bytes = |i: usize| if node.op.element(i) == Element::F32 { 4.0 } else { 2.0 };
    let written = node.outputs.iter().enumerate();
    read + written.filter_map(|(i, tensor)| tensor.map(|tensor| bytes(i) * elements(tensor))).sum::<f64>()
}

/// FLOPs of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Flops {
    /// Three times the forward pass of the whole model.
    pub model: f64,
    /// What all ranks of the tensor axis do: recomputation, and what each of them computes whole, besides.
    pub hardware: f64,
}

impl Flops {
    /// Of a full batch of images of the expected size.
    pub fn of(rank: &RankStep) -> Self {
        let (graph, work): (_, Workload) = (rank.step.graph(), rank.workload());
        let nodes = rank.step.plan().order.iter().map(|&index| &graph.nodes()[index]);
        let own: f64 = nodes.map(|node| graph.node_flops(node, &work)).sum();
        Self { model: rank.step.flops(&work), hardware: own * rank.tensor() as f64 }
    }
}

/// Seconds of a batch whose nodes take so long: a stream of nodes and one of messages.
fn timeline(
    schedule: &Schedule,
    nodes: impl Iterator<Item = f64>,
    gather: impl Fn(usize) -> f64,
    reduce: impl Fn(usize) -> f64,
) -> f64 {
    let (mut now, mut channel, mut reduced) = (0.0f64, 0.0f64, 0.0f64);
    let mut gathered = vec![0.0f64; schedule.visits().len()];
    for (at, seconds) in nodes.enumerate() {
        for (actions, seconds) in [(schedule.before(at), seconds), (schedule.after(at), 0.0)] {
            for action in actions {
                match *action {
                    Action::Post(visit) => {
                        channel = channel.max(now) + gather(visit);
                        gathered[visit] = channel;
                    }
                    Action::Await(visit) => now = now.max(gathered[visit]),
                    Action::Release(_) | Action::Clear(_) => {}
                    Action::Reduce(unit) => {
                        now = now.max(reduced);
                        channel = channel.max(now) + reduce(unit);
                        reduced = channel;
                    }
                }
            }
            now += seconds;
        }
    }
    now.max(reduced)
}
