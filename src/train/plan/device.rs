//! Memory of a rank on a GPU, before anything is allocated.
//!
//! With P the elements of the rank's parts of all parameters, D ranks of the data axis and K of the tensor axis, T
//! token rows of a batch and width W:
//!
//! | kind | bytes | source |
//! |---|---|---|
//! | weights | 6P/D: f32, and the copy in bf16 that products read or others gather | `train::engine` |
//! | moments | 8P/D | AdamW, f32 |
//! | moving average | 6P/D where it is kept, as the weights | |
//! | gradients | 4P/D, f32 | |
//! | gathered weights | where D > 1, two buffers in bf16, for visits in turn: the largest unit of each | [`Schedule`](crate::parallel::zero::Schedule) |
//! | gradients of blocks | where D > 1, two buffers in f32, for reductions in turn | the same |
//! | activations | the arena of the recorded step | [`ArenaPlan`] |
//! | input, workspace, evaluation | those of a model of two blocks with heads/K heads and mlp/K hidden features, whose kernels are of the same shapes | [`DeviceMemory::plan`] |
//! | messages | where K > 1, 2 gathered operands of T·W in bf16, and 4 chunks of T·W/K | ring schedules, [`ring`](crate::parallel::ring) |
//!
//! A whole model on one GPU takes what [`DeviceMemory::plan`] tells, to the byte but for the padding of parameters.

use super::memory::RankMemory;
use super::rank::{Pieces, RankStep};
use crate::autograd::Plan;
use crate::autograd::device::{ArenaPlan, fused};
use crate::device::DeviceInfo;
use crate::error::Result;
use crate::parallel::zero::Action;
use crate::recipe::Recipe;
use crate::train::engine::DeviceMemory;

const F32: usize = 4;
const BF16: usize = 2;

/// What does not depend on the data axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared {
    activations: usize,
    small: DeviceMemory,
}

impl Shared {
    /// Of a step on such a device.
    ///
    /// # Errors
    /// A model that the kernels do not take.
    pub fn of(info: &DeviceInfo, rank: &RankStep) -> Result<Self> {
        let graph = fused(rank.step.graph());
        let activations = ArenaPlan::new(&graph, &Plan::new(&graph)).bytes;
        let narrow = narrow(&rank.recipe, rank.tensor())?;
        let small = DeviceMemory::plan(info, &narrow, rank.step.classes(), rank.slots)?;
        Ok(Self { activations, small })
    }
}

/// The recipe with at most two blocks, each a rank's part of the whole one.
fn narrow(recipe: &Recipe, tensor: usize) -> Result<Recipe> {
    let dims = recipe.model.dimensions()?;
    let mut narrow = recipe.clone();
    let model = &mut narrow.model;
    (model.shape, model.width, model.depth) = (String::new(), dims.width, dims.depth.min(2));
    (model.heads, model.head_dim, model.mlp) = (dims.heads / tensor, dims.head_dim, dims.mlp / tensor);
    Ok(narrow)
}

/// Memory of the first rank.
pub fn memory(rank: &RankStep, shared: &Shared, pieces: &Pieces) -> RankMemory {
    let [kept, average] = [pieces.kept(), if rank.recipe.train.ema > 0.0 { pieces.kept() } else { 0 }];
    let (mut gathered, mut unit_gradients, mut messages) = (0, 0, 0);
    if pieces.data() > 1 {
        let len = |unit: usize| pieces.units.units()[unit].len;
        gathered = BF16 * in_turn(pieces.schedule.visits().iter().map(|visit| len(visit.unit)));
        let order = 0..rank.step.plan().order.len();
        let reduced = order.flat_map(|at| pieces.schedule.after(at)).filter_map(|action| match action {
            Action::Reduce(unit) => Some(len(*unit)),
            _ => None,
        });
        unit_gradients = F32 * in_turn(reduced);
    }
    if rank.tensor() > 1 {
        let rows = rank.recipe.packing.tokens;
        let width = rank.recipe.model.dimensions().map_or(0, |dims| dims.width);
        messages = BF16 * (2 * rows * width + 4 * (rows / rank.tensor()) * width);
    }
    RankMemory {
        weights: (F32 + BF16) * kept,
        moments: 2 * F32 * kept,
        average: (F32 + BF16) * average,
        gradients: F32 * kept,
        gathered,
        unit_gradients,
        activations: shared.activations,
        input: shared.small.input,
        workspace: shared.small.workspace,
        messages,
        evaluation: shared.small.evaluation,
    }
}

/// Elements of two buffers that are used in turn.
fn in_turn(lens: impl Iterator<Item = usize>) -> usize {
    let mut most = [0; 2];
    lens.enumerate().for_each(|(i, len)| most[i % 2] = most[i % 2].max(len));
    most.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_in_turn_hold_the_largest_of_their_turn() {
        assert_eq!(in_turn([3, 10, 9, 11, 2].into_iter()), 9 + 11);
        assert_eq!(in_turn([7].into_iter()), 7);
    }
}
