//! Bytes that a rank sends in a step.
//!
//! With a batches of a rank a step, K ranks of the tensor axis and D of the data axis, and e bytes an element of
//! activations and weights on their way (bf16: 2; f32 on the CPU: 4):
//!
//! | kind | axis | bytes a step | source |
//! |---|---|---|---|
//! | activations | tensor | e·a·[`sharded::volume`] | (K − 1)/K of T·W for each gather and reduction, `nn::block` |
//! | weights | data | e·a·Σ over visits of (D − 1) pieces | ZeRO-3 gathers for each [`Visit`](crate::parallel::zero::Visit) |
//! | gradients | data | 4·a·Σ over units of all but the own piece | f32; with the weights it is [`Schedule::volume`](crate::parallel::zero::Schedule::volume) |
//! | small sums | both | all-reduces of gradients whose summands the tensor axis has, of norm (LAMB: and norms of all parameters; Adafactor: 4 bytes for each row and column of all), loss weights and counts | once a step, `CpuEngine` |

use serde::Serialize;

use super::rank::{Pieces, RankStep};
use crate::autograd::{Split, sharded};
use crate::cpu::optim::adafactor::Factoring;
use crate::parallel::collectives::part_of;
use crate::recipe::OptimizerKind;

/// Bytes that the first rank sends in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Over the tensor axis, for the linear layers that it shares out.
    pub activations: u64,
    /// Over the data axis.
    pub weights: u64,
    /// Over the data axis.
    pub gradients: u64,
    /// Over the tensor axis: gradients of which each rank has a summand.
    pub tensor_sums: u64,
    /// Over the data axis and over all ranks: loss weights, counts and norms.
    pub counts: u64,
}

impl Traffic {
    /// Of `batches` batches a step, with so many bytes for an element of activations and weights.
    pub fn of(rank: &RankStep, pieces: &Pieces, batches: usize, element: u64) -> Self {
        let (graph, order) = (rank.step.graph(), &rank.step.plan().order);
        let others = pieces.data() as u64 - 1;
        let visits = pieces.schedule.visits().iter();
        let weights: u64 = visits.map(|visit| others * pieces.piece(visit.unit, 0) as u64).sum();
        let gradients = pieces.schedule.volume(&pieces.units) - weights;
        let summed = pieces.units.slices().iter().filter(|slice| graph.split(slice.param) == Split::Summed);
        let summed = summed.map(|slice| slice.range.len()).sum();
        let (batches, world) = (batches as u64, pieces.data() * rank.tensor());
        let kind = rank.recipe.train.optimizer;
        let statistics: usize = kind.factorings(graph.params()).into_iter().map(Factoring::len).sum();
        let norms = if kind == OptimizerKind::Lamb { all_reduce(2 * graph.params().len(), world) } else { 0 };
        Self {
            activations: element * batches * sharded::volume(graph, order, 0),
            weights: element * batches * weights,
            gradients: 4 * batches * gradients,
            tensor_sums: 4 * all_reduce(summed, rank.tensor()),
            // Sum of the loss weights; loss, recognised images, FLOPs and three counts; norm.
            counts: 8
                * (all_reduce(1, pieces.data())
                    + all_reduce(6, pieces.data())
                    + all_reduce(1, world)
                    + norms)
                + 4 * all_reduce(statistics, world),
        }
    }

    /// Over the tensor axis.
    pub fn tensor(&self) -> u64 {
        self.activations + self.tensor_sums
    }

    /// Over the data axis.
    pub fn data(&self) -> u64 {
        self.weights + self.gradients + self.counts
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.tensor() + self.data()
    }
}

/// Elements that the first of `ranks` sends in an all-reduce of `len`: their parts to the others, and the sum of its
/// own to all.
fn all_reduce(len: usize, ranks: usize) -> u64 {
    let own = part_of(len, ranks, 0).len();
    (len - own + (ranks - 1) * own) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_all_reduce_sends_twice_all_but_a_part() {
        assert_eq!(all_reduce(12, 4), 2 * 3 * 3);
        assert_eq!([all_reduce(7, 1), all_reduce(1, 8), all_reduce(0, 3)], [0, 7, 0]);
    }
}
