//! What a run starts from: fresh or given weights, or its own last checkpoint.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::checkpoint::{self, Header, Progress as Progressed};
use super::engine::{CpuEngine, DeviceEngine, DeviceOptions, Engine, TrainState, check_fits};
use super::plan::RunPlan;
use super::run::{Parts, Trainer};
use super::run_dir::RunDir;
use super::step::TrainStep;
use super::terminal::{quoted, say, tell};
use crate::data::loader::{Loader, LoaderState};
use crate::data::packing;
use crate::data::source::{self, Dataset};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::nn::init::initialise;
use crate::parallel::MeshGroups;
use crate::recipe::Recipe;
use crate::weights::{Policy, assign, foreign};

/// What a new run starts from.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Name of the run folder.
    pub name: String,
    /// Everything that decides the run.
    pub recipe: Recipe,
    /// Where run folders are made.
    pub out: PathBuf,
    /// Weights to start from.
    pub init: Option<PathBuf>,
}

/// What a run takes place on.
#[derive(Clone, Default)]
pub struct Target {
    /// The device; none is the CPU.
    pub device: Option<Device>,
    /// How it runs steps.
    pub options: DeviceOptions,
}

/// Starts a run.
///
/// # Errors
/// Bad data, recipe or weights, or a device without room or kernels for it, before anything is written; later
/// failures name the last checkpoint.
pub fn start(options: TrainOptions, target: &Target) -> Result<()> {
    let recipe = options.recipe;
    let dataset = open_data(&recipe)?;
    let step = TrainStep::new(&recipe, dataset.classes.len(), packing::slots(&recipe))?;
    let mut notes = Vec::new();
    let params = match &options.init {
        None => initialise(step.params(), recipe.train.seed),
        Some(path) => initial_weights(path, &recipe, &dataset.classes, &step, &mut notes)?,
    };
    let state = TrainState::fresh(params, recipe.train.ema > 0.0);
    let (engine, plan) = engine(target, &recipe, step, state)?;
    let mut loader = Loader::train(dataset.train.clone(), &recipe, None)?;
    loader.ready()?;
    let header = Header {
        recipe: recipe.to_toml()?,
        classes: dataset.classes.clone(),
        progress: Progressed::default(),
    };
    let run = RunDir::create(&options.out, &options.name, &header.recipe)?;
    notes.iter().for_each(|note| say(note));
    Trainer::new(Parts { recipe, dataset, engine, loader, header, run }, &plan)?.train()
}

/// Continues the run in `folder` from its last checkpoint, exactly where it is on the device that it was on.
///
/// # Errors
/// If `folder` holds no checkpoint, or its data has changed; a device without room or kernels for it.
pub fn resume(folder: &Path, target: &Target) -> Result<()> {
    let run = RunDir::resume(folder)?;
    let header = checkpoint::load_header(&run.last())?;
    let recipe = Recipe::from_toml(&header.recipe, &run.last())?;
    let dataset = open_data(&recipe)?;
    if dataset.classes != header.classes {
        return Err(Error::usage(format!(
            "{}: the data now has {} classes and not the {} that the run was started with; restore the data, or start \
             a new run with --init",
            folder.display(),
            dataset.classes.len(),
            header.classes.len()
        )));
    }
    let Progressed { step: done, evaluated, .. } = header.progress;
    if done >= recipe.train.steps && (evaluated == Some(done) || dataset.validation.is_empty()) {
        let run = quoted(run.path());
        return tell(&format!(
            "{run} is finished: all {done} steps are done; train on from it with --init {run}/last.safetensors, or \
             evaluate it with: trencadis eval {run}"
        ));
    }
    let step = TrainStep::new(&recipe, dataset.classes.len(), packing::slots(&recipe))?;
    let (header, state) = checkpoint::load_training(&run.last(), step.params())?;
    let loader_state: LoaderState = serde_json::from_value(header.progress.loader.clone())
        .map_err(|e| Error::file(&run.last(), format!("the position in the data is damaged ({e})")))?;
    let (engine, plan) = engine(target, &recipe, step, state)?;
    let loader = Loader::train(dataset.train.clone(), &recipe, Some(&loader_state))?;
    Trainer::new(Parts { recipe, dataset, engine, loader, header, run }, &plan)?.train()
}

/// The engine of a run with its weights, and what it needs.
fn engine(
    target: &Target,
    recipe: &Recipe,
    step: TrainStep,
    state: TrainState<'static>,
) -> Result<(Box<dyn Engine>, RunPlan)> {
    let slots = packing::slots(recipe);
    let Some(device) = &target.device else {
        let plan = RunPlan::of(recipe, &step, slots, None);
        return Ok((
            Box::new(CpuEngine::new(recipe, step, slots, state, Rc::new(MeshGroups::alone()))?),
            plan,
        ));
    };
    let memory = check_fits(device.info(), device.free_bytes()?, recipe, step.classes(), slots)?;
    let plan = RunPlan::of(recipe, &step, slots, Some(memory));
    let mut engine = DeviceEngine::new(device, recipe, step, slots, target.options)?;
    engine.load(&state)?;
    Ok((Box::new(engine), plan))
}

fn open_data(recipe: &Recipe) -> Result<Dataset> {
    source::open(&recipe.data, recipe.model.channels, recipe.train.seed)
}

fn initial_weights(
    path: &Path,
    recipe: &Recipe,
    classes: &[String],
    step: &TrainStep,
    notes: &mut Vec<String>,
) -> Result<Vec<Vec<f32>>> {
    let (header, mut weights) = checkpoint::load_model(path)?;
    let mut described = recipe.model.clone();
    if let Some(header) = header {
        described = Recipe::from_toml(&header.recipe, path)?.model;
        if header.classes != classes {
            // As many classes as before, perhaps, but other ones.
            let heads: Vec<&str> = step.params().iter().filter(|p| p.head).map(|p| p.name.as_str()).collect();
            weights.tensors.retain(|name, _| !heads.contains(&name.as_str()));
        }
    }
    let weights = foreign::detect_and_convert(weights, &mut described)?;
    let mut differences = described.differences(&recipe.model)?;
    if !differences.is_empty() {
        let (there, here) = (described.dimensions()?, recipe.model.dimensions()?);
        for (key, there, here) in [
            ("width", there.width, here.width),
            ("depth", there.depth, here.depth),
            ("mlp", there.mlp, here.mlp),
        ] {
            if there != here {
                differences.insert(0, format!("model.{key} is {there} there and {here} here"));
            }
        }
        return Err(Error::file(
            path,
            format!(
                "was made by another model: {}; give the recipe the same values, with --set or in a file of your own",
                differences.join(", ")
            ),
        ));
    }
    let policy = Policy::NewHead { seed: recipe.train.seed };
    let (params, report) = assign(path, weights, step.params(), policy)?;
    notes.push(format!("start             {} tensors from {}", report.taken, path.display()));
    if !report.fresh.is_empty() {
        notes.push(format!("fresh             {}", report.fresh.join(", ")));
    }
    Ok(params)
}
