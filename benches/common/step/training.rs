//! A training over batches of random pixels, as fast as its device runs it. It is also what
//! `examples/torch_bridge` holds against PyTorch.

use std::time::Instant;

use trencadis::data::batch::PackedBatch;
use trencadis::data::packing;
use trencadis::device::Device;
use trencadis::nn::init::initialise;
use trencadis::recipe::Recipe;
use trencadis::train::engine::{
    DeviceEngine, DeviceMemory, DeviceOptions, Engine, TrainState, largest_tokens,
};
use trencadis::train::profile::batches::batches;
use trencadis::train::step::TrainStep;
use trencadis::{Error, Result};

/// Learning rate of every step.
pub const RATE: f64 = 1e-4;

/// A training that is ready to run.
pub struct Training {
    recipe: Recipe,
    engine: DeviceEngine,
    batches: Vec<PackedBatch>,
    /// Steps queued so far.
    queued: usize,
    first_loss: f64,
}

/// What some steps did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Run {
    pub steps: usize,
    pub seconds: f64,
    /// Tokens and images of all steps.
    pub tokens: f64,
    pub images: f64,
    /// Model FLOPs.
    pub flops: f64,
    /// Seconds for which the device had nothing to do between steps.
    pub idle: f64,
    /// Loss of the training's first step and of the newest.
    pub first_loss: f64,
    pub loss: f64,
}

/// A recipe whose steps are one batch each and, where it does not fit the device, of fewer tokens; with AdamW, which
/// is what it is compared with.
///
/// # Errors
/// An unknown recipe or setting; a model that the kernels do not take, or that does not fit at all.
pub fn fitting(device: &Device, name: &str, sets: &[String], classes: usize) -> Result<Recipe> {
    let own = ["train.accumulate=1", "train.optimizer=\"adamw\""].map(String::from);
    let sets: Vec<String> = own.iter().chain(sets).cloned().collect();
    let mut recipe = Recipe::load(name, &sets)?;
    let free = device.free_bytes()?;
    let Some(tokens) = largest_tokens(device.info(), free, &recipe, classes)? else {
        return Err(Error::usage(format!("{name} does not fit the {} MiB that are free", free >> 20)));
    };
    recipe.packing.tokens = tokens;
    Ok(recipe)
}

impl Training {
    /// The training of `recipe` from fresh weights, over `count` batches again and again, after some steps to warm
    /// up.
    ///
    /// # Errors
    /// A model or batch that the kernels do not take; no room on the device.
    pub fn open(device: &Device, recipe: &Recipe, classes: usize, count: usize) -> Result<Self> {
        let slots = packing::slots(recipe);
        let step = TrainStep::new(recipe, classes, slots)?;
        let state = TrainState::fresh(initialise(step.params(), recipe.train.seed), recipe.train.ema > 0.0);
        let mut engine = DeviceEngine::new(device, recipe, step, slots, DeviceOptions::default())?;
        engine.load(&state)?;
        let batches = batches(recipe, classes, count)?;
        let mut training = Self { recipe: recipe.clone(), engine, batches, queued: 0, first_loss: f64::NAN };
        training.run(2)?;
        Ok(training)
    }

    /// The recipe as it runs.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The engine.
    pub fn engine(&self) -> &DeviceEngine {
        &self.engine
    }

    /// The batches.
    pub fn batches(&self) -> &[PackedBatch] {
        &self.batches
    }

    /// Device memory that it takes.
    pub fn memory(&self) -> DeviceMemory {
        self.engine.memory()
    }

    fn queue(&mut self) -> Result<()> {
        let at = self.queued % self.batches.len();
        self.queued += 1;
        self.engine.queue(&self.batches[at..=at], RATE)
    }

    /// Runs steps, with as many under way as the engine takes, and times them from the end of the step before them
    /// to the end of the last.
    ///
    /// # Errors
    /// A failed device; a loss that is not finite.
    pub fn run(&mut self, steps: usize) -> Result<Run> {
        for _ in 0..self.engine.depth() {
            self.queue()?;
        }
        let before = self.engine.collect()?;
        if self.first_loss.is_nan() {
            self.first_loss = before.loss;
        }
        let mut run = Run { steps, first_loss: self.first_loss, ..Run::default() };
        let begun = Instant::now();
        for _ in 0..steps {
            self.queue()?;
            let outcome = self.engine.collect()?;
            run.tokens += outcome.tokens as f64;
            run.images += outcome.images as f64;
            run.flops += outcome.flops;
            run.idle += outcome.idle.unwrap_or(0.0);
            run.loss = outcome.loss;
        }
        run.seconds = begun.elapsed().as_secs_f64();
        for _ in 1..self.engine.depth() {
            self.engine.collect()?;
        }
        match run.first_loss.is_finite() && run.loss.is_finite() {
            true => Ok(run),
            false => Err(Error::failure(format!("the loss went from {} to {}", run.first_loss, run.loss))),
        }
    }
}
