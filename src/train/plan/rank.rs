//! What one rank of a mesh records of a training.

use crate::autograd::{Graph, Plan, Shard, Workload};
use crate::error::Result;
use crate::parallel::zero::{Schedule, Units};
use crate::recipe::Recipe;
use crate::train::step::TrainStep;

/// The step of a recipe as the ranks of a tensor axis record it, and how it lies on a data axis.
///
/// Of all ranks the first holds the most and sends the most: its pieces are whole.
pub struct RankStep {
    /// The recipe.
    pub recipe: Recipe,
    /// Image slots of a batch.
    pub slots: usize,
    /// The step.
    pub step: TrainStep,
}

/// What the data axis shares out.
pub struct Pieces {
    /// The units.
    pub units: Units,
    /// When they come and go in a step.
    pub schedule: Schedule,
}

impl RankStep {
    /// Records the step of the first of `tensor` ranks.
    ///
    /// # Errors
    /// If the model's shape is invalid, or cannot be shared out.
    pub fn record(recipe: &Recipe, classes: usize, slots: usize, tensor: usize) -> Result<Self> {
        let shard = Shard { rank: 0, size: tensor };
        Ok(Self { step: TrainStep::of_shard(recipe, classes, slots, shard)?, recipe: recipe.clone(), slots })
    }

    /// Length of the tensor axis.
    pub fn tensor(&self) -> usize {
        self.step.graph().shard().size
    }

    /// What it is on a data axis of `data` ranks.
    pub fn pieces(&self, data: usize) -> Pieces {
        Pieces::new(self.step.graph(), self.step.plan(), data)
    }

    /// A full batch of images of the expected size.
    pub fn workload(&self) -> Workload {
        super::workload(&self.recipe)
    }
}

impl Pieces {
    /// Those of the first of `data` ranks.
    pub fn new(graph: &Graph, plan: &Plan, data: usize) -> Self {
        let units = Units::new(graph, Shard { rank: 0, size: data });
        Self { schedule: Schedule::new(graph, plan, &units), units }
    }

    /// Length of the data axis.
    pub fn data(&self) -> usize {
        self.units.rank().size
    }

    /// Elements that the rank keeps.
    pub fn kept(&self) -> usize {
        self.units.slices().iter().map(|slice| slice.range.len()).sum()
    }

    /// Elements of `unit` that rank `rank` keeps.
    pub fn piece(&self, unit: usize, rank: usize) -> usize {
        self.units.slices_of(unit, rank).iter().map(|slice| slice.range.len()).sum()
    }
}
