//! A recipe: everything that decides a run, as TOML. Named recipes are embedded in the binary,
//! extend each other with `extends`, and are overridden on the command line with `--set`.
//!
//! Every other room reads its settings from here; what single operations are told stands in [`ops`](crate::ops).

use serde::{Deserialize, Serialize};

mod augment;
pub(crate) mod compare;
mod data;
mod distill;
pub mod load;
mod mix;
mod model;
pub mod shapes;
mod text;
mod train;
mod validate;

pub use crate::ops::{
    ContrastiveKind, GeluKind, LossKind, NormKind, PositionBasis, PositionCombination, PositionConfig,
    PositionCoordinate, PositionResample, QkNormKind, Rope, RopeConfig, RopeCoordinate, RopeFrequencies,
    RopeOrder,
};
pub use augment::*;
pub use data::*;
pub use distill::DistillConfig;
pub use mix::MixConfig;
pub use model::*;
pub use text::*;
pub use train::*;
pub use validate::MAX_SIDE;

/// Everything that decides a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// One line for `trencadis recipes`.
    pub description: String,
    /// The network.
    pub model: ModelConfig,
    /// Where images come from and how they are normalised.
    pub data: DataConfig,
    /// To which size each image is resized.
    pub resolution: ResolutionConfig,
    /// How images share a batch.
    pub packing: PackingConfig,
    /// Which tokens are dropped during training.
    pub drop: DropConfig,
    /// How training images are varied.
    pub augment: AugmentConfig,
    /// How images are mixed with others during training.
    pub mix: MixConfig,
    /// Learning from another model.
    pub distill: DistillConfig,
    /// The text tower, where images are learned from texts.
    pub text: TextConfig,
    /// The loss over images and texts.
    pub contrastive: ContrastiveConfig,
    /// Optimiser, schedule, saving.
    pub train: TrainConfig,
    /// Evaluation.
    pub eval: EvalConfig,
}
