//! A training over batches of random pixels, as fast as its device runs it. It is also what
//! `examples/torch_bridge` holds against PyTorch.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use rand::Rng as _;
use trencadis::data::assemble::Assembler;
use trencadis::data::batch::{PREFIX, PackedBatch, Patches};
use trencadis::data::packing::{self, PackingSettings};
use trencadis::data::planner::Planner;
use trencadis::data::source::{Image, Source};
use trencadis::data::view::ViewSettings;
use trencadis::device::Device;
use trencadis::nn::init::initialise;
use trencadis::recipe::{MixConfig, Recipe};
use trencadis::rng::{Purpose, Stream};
use trencadis::train::engine::{
    DeviceEngine, DeviceMemory, DeviceOptions, Engine, TrainState, largest_tokens,
};
use trencadis::train::step::TrainStep;
use trencadis::{Error, Result};

/// Learning rate of every step.
pub const RATE: f64 = 1e-4;
/// Images that the sizes are drawn from.
const IMAGES: usize = 1 << 15;

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

/// Images that have a size, up to 1:2 or 2:1, and no pixels.
struct Sizes {
    classes: usize,
}

impl Source for Sizes {
    fn len(&self) -> usize {
        IMAGES
    }

    fn name(&self, index: usize) -> String {
        format!("image {index}")
    }

    fn label(&self, index: usize) -> usize {
        index * 37 % self.classes
    }

    fn size(&self, index: usize) -> Result<(usize, usize)> {
        let mut stream = Stream::new(3, 0, index as u64, Purpose::Resolution);
        let aspect = (2.0 * stream.uniform() - 1.0).exp2().sqrt();
        Ok(((512.0 * aspect) as usize, (512.0 / aspect) as usize))
    }

    fn load(&self, index: usize, _: usize) -> Result<Image> {
        Err(Error::failure(format!("image {index} has no pixels")))
    }
}

/// Batches as training on `recipe` meets them, of random pixels.
///
/// # Errors
/// A recipe that is not valid.
pub fn batches(recipe: &Recipe, classes: usize, count: usize) -> Result<Vec<PackedBatch>> {
    let settings = PackingSettings::train(recipe)?;
    let source = Arc::new(Sizes { classes });
    let mut planner = Planner::new(source.clone(), settings.clone(), None)?;
    let mut assembler =
        Assembler::new(&*source, settings, ViewSettings::eval(recipe), MixConfig::default(), 1);
    // No image is loaded: the batch is laid out, and its patches are filled here.
    let stop = AtomicBool::new(true);
    let mut made = Vec::with_capacity(count);
    while made.len() < count
        && let Some(plan) = planner.next_batch()?
    {
        let mut batch = assembler.assemble(&plan, &stop).batch;
        let mut random = Stream::new(recipe.train.seed, 0, made.len() as u64, Purpose::Augment);
        let live = batch.live_tokens();
        if let Patches::U8(pixels) = &mut batch.patches {
            let rows = pixels.chunks_exact_mut(batch.patch_dim).zip(&batch.positions).take(live);
            rows.filter(|(_, position)| **position != PREFIX).for_each(|(row, _)| random.fill_bytes(row));
        }
        made.push(batch);
    }
    Ok(made)
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
