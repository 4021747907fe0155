//! What is profiled, the same on every device.

use super::{Peaks, Profile, Span, batches, by_operation, one_batch};
use crate::data::batch::PackedBatch;
use crate::data::packing;
use crate::error::{Error, Result};
use crate::nn::init::initialise;
use crate::recipe::{Recipe, ViewsKind};
use crate::train::engine::TrainState;
use crate::train::step::TrainStep;

/// Steps of a recipe over one batch, from fresh weights.
pub struct Subject {
    /// One batch a step, whose patches are random: there are no images that a device could make them of.
    pub recipe: Recipe,
    pub slots: usize,
    pub step: TrainStep,
    pub state: TrainState<'static>,
    pub batch: PackedBatch,
}

impl Subject {
    /// For a head of so many classes.
    ///
    /// # Errors
    /// A recipe of texts, or one that is not valid.
    pub fn new(recipe: &Recipe, classes: usize) -> Result<Self> {
        let mut recipe = one_batch(recipe)?;
        recipe.data.views = ViewsKind::Host;
        let slots = packing::slots(&recipe);
        let step = TrainStep::new(&recipe, classes, slots)?;
        let weights = initialise(step.params(), recipe.train.seed);
        let state = TrainState::fresh(weights, recipe.train.ema > 0.0);
        let batch = batches::batches(&recipe, classes, 1)?.pop();
        let batch = batch.ok_or_else(|| Error::failure("the recipe packs no batch"))?;
        Ok(Self { recipe, slots, step, state, batch })
    }
}

/// What was timed.
pub struct Timed {
    /// What it ran on, for people.
    pub device: String,
    /// How many steps, seconds of one and its model FLOPs.
    pub steps: usize,
    pub seconds: f64,
    pub flops: f64,
    pub peaks: Option<Peaks>,
    pub spans: Vec<Span>,
}

impl Timed {
    /// The profile of a recipe called `name`, of which `recipe` ran over `batch`.
    pub fn profile(self, name: &str, recipe: &Recipe, batch: &PackedBatch) -> Profile {
        let Self { device, steps, seconds, flops, peaks, spans } = self;
        Profile {
            recipe: name.into(),
            device,
            budget: recipe.packing.tokens,
            tokens: batch.live_tokens(),
            images: batch.images,
            steps,
            seconds,
            flops,
            peaks,
            input: None,
            rows: by_operation(&spans),
            spans,
        }
    }
}
