//! What a run starts from: fresh or given weights, or its own last checkpoint.

mod initial;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use self::initial::{Known, initial_weights};
use super::checkpoint::{self, Header, Progress as Progressed, SavedTraining};
use super::distill::Teacher;
use super::engine::{
    CpuEngine, DeviceEngine, DeviceOptions, DeviceRanks, Engine, Fresh, StateKind, StateSource, Wanted,
    check_fits,
};
use super::plan::RunPlan;
use super::run::{Parts, Trainer};
use super::run_dir::RunDir;
use super::step::{TrainStep, one_rank};
use super::terminal::{quoted, tell};
use crate::autograd::ParamSpec;
use crate::data::balance::check_deals;
use crate::data::loader::{Loader, LoaderState, Share};
use crate::data::packing;
use crate::data::pictures::loaded;
use crate::data::source::{self, Dataset};
use crate::data::texts::TextSettings;
use crate::data::tokenizer::Tokenizer;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::nn::shard;
use crate::parallel::{Mesh, MeshGroups};
use crate::recipe::Recipe;
use crate::weights::{LOOKED_AT, fingerprint};

/// What a new run starts from.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Name of the run folder.
    pub name: String,
    /// Everything that decides the run.
    pub recipe: Recipe,
    /// Where run folders are made.
    pub out: PathBuf,
    /// Weights to start from: a file, or the folder of a run, whose best model is meant.
    pub init: Option<PathBuf>,
}

/// What a run takes place on.
#[derive(Clone)]
pub struct Target {
    /// The device; none is the CPU.
    pub device: Option<Device>,
    /// How many ranks share it.
    pub sharing: usize,
    /// How it runs steps.
    pub options: DeviceOptions,
    /// This rank among those that train together.
    pub ranks: Rc<MeshGroups>,
}

impl Default for Target {
    fn default() -> Self {
        Self {
            device: None,
            sharing: 1,
            options: DeviceOptions::default(),
            ranks: Rc::new(MeshGroups::alone()),
        }
    }
}

/// Starts a run. Every rank of it calls this with the same options.
///
/// # Errors
/// Bad data, recipe or weights, ranks that differ or cannot share the run, or a device without room or kernels for it,
/// on every rank before anything is written; later failures name the last checkpoint.
pub fn start(options: TrainOptions, target: &Target) -> Result<()> {
    let (mut recipe, ranks) = (options.recipe, &target.ranks);
    let tokenizer = ranks.agree(tokenizer_of(&mut recipe, options.init.is_some()))??;
    check_recipes(&recipe, target)?;
    let dataset = ranks.agree(open_data(&recipe))??;
    check_data(&dataset, ranks)?;
    ranks.agree(check_prompts(&recipe, &dataset, tokenizer.as_ref()))??;
    let mut notes = Vec::new();
    let known = Known { classes: &dataset.classes, tokenizer: tokenizer.as_deref() };
    let from = beginning(&recipe, ranks, options.init.as_deref(), known, &mut notes);
    let (step, state) = ranks.agree(from)??;
    // Drawn weights follow from the recipe.
    let given = ranks.any(options.init.is_some())?;
    if given {
        check_weights(step.params(), &state, ranks)?;
    }
    // Before the plan, which counts what memory is free.
    let teacher = Teacher::of_run(&recipe, &dataset, target)?;
    let plan = ranks.agree(plan(target, &recipe, &step))??;
    let engine = engine(target, &recipe, step, &state)?;
    let seen = loaded(&recipe, target.device.is_some());
    let loader = Loader::train_texts(dataset.train.clone(), &seen, None, share(ranks), tokenizer.clone());
    let loader = ranks.agree(loader.and_then(|mut loader| loader.ready().map(|()| loader)))??;
    let header = Header {
        recipe: recipe.to_toml()?,
        classes: dataset.classes.clone(),
        tokenizer: tokenizer.as_ref().map(|tokenizer| tokenizer.json().to_owned()),
        progress: Progressed::default(),
    };
    let run = run_dir(ranks, || RunDir::create(&options.out, &options.name, &header.recipe))?;
    let ranks = ranks.clone();
    let parts = Parts { recipe, dataset, engine, teacher, loader, tokenizer, header, run, ranks };
    Trainer::new(parts, &plan, &notes)?.train()
}

/// Refuses to lock an image tower that nothing was `given` for.
///
/// # Errors
/// One sentence that says so.
pub fn check_lock(recipe: &Recipe, given: bool) -> Result<()> {
    if recipe.contrastive.lock_image && !given {
        return Err(Error::usage(
            "contrastive.lock_image = true trains a text tower to a trained image tower; give its weights with --init",
        ));
    }
    Ok(())
}

/// The tokenizer of a run on texts, whose vocabulary the recipe then tells.
fn tokenizer_of(recipe: &mut Recipe, given: bool) -> Result<Option<Arc<Tokenizer>>> {
    if !recipe.text.is_on() {
        return Ok(None);
    }
    check_lock(recipe, given)?;
    let tokenizer = Tokenizer::open(&recipe.text.tokenizer)?;
    let (known, stated) = (tokenizer.vocabulary(), recipe.text.vocabulary);
    if stated > 0 && stated != known {
        return Err(Error::usage(format!(
            "text.vocabulary = {stated}, but text.tokenizer = \"{}\" knows {known} tokens; leave text.vocabulary at 0",
            recipe.text.tokenizer
        )));
    }
    recipe.text.vocabulary = known;
    Ok(Some(Arc::new(tokenizer)))
}

/// Refuses classes that a run on texts could not tell by their prompts when it evaluates.
fn check_prompts(recipe: &Recipe, dataset: &Dataset, tokenizer: Option<&Arc<Tokenizer>>) -> Result<()> {
    let Some(tokenizer) = tokenizer.filter(|_| dataset.classes.len() > 1) else { return Ok(()) };
    let texts = TextSettings::new(recipe, packing::slots(recipe), tokenizer.clone());
    let mut prompts = recipe.text.prompts.iter();
    prompts.try_for_each(|prompt| texts.encode_classes(prompt, &dataset.classes).map(drop))
}

/// The step of a new run, and the weights before the first: fresh ones, or those of a file.
fn beginning(
    recipe: &Recipe,
    ranks: &MeshGroups,
    init: Option<&Path>,
    known: Known<'_>,
    notes: &mut Vec<String>,
) -> Result<(TrainStep, Fresh)> {
    let slots = packing::slots(recipe);
    let step = TrainStep::of_shard(recipe, known.classes.len(), slots, ranks.place().tensor)?;
    let keep_average = recipe.train.ema > 0.0;
    let state = match init {
        None => Fresh::drawn(step.params(), recipe.train.seed, keep_average),
        Some(path) => {
            let weights = initial_weights(path, recipe, known, &step, notes)?;
            Fresh::given(step.params(), weights, keep_average)
        }
    };
    Ok((step, state))
}

/// Continues the run in `folder` from its last checkpoint, on any mesh: exactly where it is on the device and mesh
/// that it was on.
///
/// # Errors
/// If `folder` holds no checkpoint, or its data has changed; ranks that differ or cannot share the run; a device
/// without room or kernels for it.
pub fn resume(folder: &Path, target: &Target) -> Result<()> {
    let ranks = &target.ranks;
    let run = run_dir(ranks, || RunDir::resume(folder))?;
    let read = || -> Result<(Header, Recipe, Option<Arc<Tokenizer>>)> {
        let header = checkpoint::load_header(&run.last())?;
        let recipe = Recipe::from_toml(&header.recipe, &run.last())?;
        let tokenizer = header.tokenizer(&run.last())?;
        Ok((header, recipe, tokenizer))
    };
    let (header, recipe, tokenizer) = ranks.agree(read())??;
    let Progressed { step: done, evaluated, .. } = header.progress;
    check_recipes(&recipe, target)?;
    ranks.world.check_same("checkpoints", &format!("step {done} of {}", run.path().display()))?;
    let open = || -> Result<Dataset> {
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
        Ok(dataset)
    };
    let dataset = ranks.agree(open())??;
    check_data(&dataset, ranks)?;
    if done >= recipe.train.steps && (evaluated == Some(done) || dataset.validation.is_empty()) {
        let run = quoted(run.path());
        if !ranks.is_first() {
            return Ok(());
        }
        return tell(&format!(
            "{run} is finished: all {done} steps are done; train on from it with --init {run}/last.safetensors, or \
             evaluate it with: trencadis eval {run}"
        ));
    }
    let from = || -> Result<(TrainStep, Header, SavedTraining, LoaderState)> {
        let (classes, slots) = (dataset.classes.len(), packing::slots(&recipe));
        let step = TrainStep::of_shard(&recipe, classes, slots, ranks.place().tensor)?;
        let (header, state) = checkpoint::open_training(&run.last(), step.params(), recipe.train.optimizer)?;
        let loader_state: LoaderState = serde_json::from_value(header.progress.loader.clone())
            .map_err(|e| Error::file(&run.last(), format!("the position in the data is damaged ({e})")))?;
        Ok((step, header, state, loader_state))
    };
    let (step, header, state, loader_state) = ranks.agree(from())??;
    check_weights(step.params(), &state, ranks)?;
    let teacher = Teacher::of_run(&recipe, &dataset, target)?;
    let plan = ranks.agree(plan(target, &recipe, &step))??;
    let engine = engine(target, &recipe, step, &state)?;
    let source = dataset.train.clone();
    let seen = loaded(&recipe, target.device.is_some());
    let loader = Loader::train_texts(source, &seen, Some(&loader_state), share(ranks), tokenizer.clone());
    let loader = ranks.agree(loader)??;
    let ranks = ranks.clone();
    let parts = Parts { recipe, dataset, engine, teacher, loader, tokenizer, header, run, ranks };
    Trainer::new(parts, &plan, &[])?.train()
}

/// Whether `mesh` can share the training of `recipe`.
///
/// # Errors
/// One sentence that names what it cannot.
pub fn check_mesh(recipe: &Recipe, mesh: Mesh) -> Result<()> {
    if recipe.text.is_on() && mesh.data() * mesh.tensor() > 1 {
        return Err(one_rank(recipe));
    }
    shard::check(&recipe.model, recipe.packing.tokens, mesh.tensor())?;
    check_deals(recipe.train.accumulate, mesh.data())
}

/// How the batches of a step are shared, as a run tells it.
pub fn mesh_line(recipe: &Recipe, mesh: Mesh) -> String {
    let accumulate = recipe.train.accumulate;
    let each = accumulate / mesh.data();
    format!("mesh              {mesh}, of the {accumulate} batches of a step {each} a data rank")
}

/// Refuses, on every rank, devices and recipes that differ, and those that the mesh cannot share.
fn check_recipes(recipe: &Recipe, target: &Target) -> Result<()> {
    let ranks = &target.ranks;
    if ranks.is_alone() {
        return Ok(());
    }
    let device = target.device.as_ref().map_or("the CPU".into(), |device| device.info().shape());
    ranks.world.check_same("devices", &device)?;
    let mine = recipe.to_toml()?;
    let first = ranks.first_text(Some(&mine))?.unwrap_or_default();
    let same = match difference(&first, &mine) {
        None => Ok(()),
        Some((key, there, here)) => Err(Error::usage(format!(
            "recipes differ: {key} is {there} on rank 0 and {here} on rank {}; start all ranks alike",
            ranks.world.rank()
        ))),
    };
    // Not `ranks.agree`, which would name the rank once more.
    ranks.world.agree(same)?;
    ranks.agree(check_mesh(recipe, ranks.mesh))?
}

/// The first key in which two resolved recipes differ, with its values.
fn difference(there: &str, here: &str) -> Option<(String, String, String)> {
    let mut section = String::new();
    for (there, here) in there.lines().zip(here.lines()) {
        if there != here {
            let part = |line: &str| {
                line.split_once(" = ").map_or((line.into(), String::new()), |(k, v)| (k.into(), v.into()))
            };
            let ((key, there), (_, here)): ((String, String), (String, String)) = (part(there), part(here));
            return Some((format!("{section}{key}"), there, here));
        }
        if let Some(name) = there.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = format!("{name}.");
        }
    }
    (there.lines().count() != here.lines().count()).then(|| {
        ("the number of keys".into(), there.lines().count().to_string(), here.lines().count().to_string())
    })
}

/// Refuses, on every rank, data sets that differ: in names or classes of their images.
fn check_data(dataset: &Dataset, ranks: &MeshGroups) -> Result<()> {
    if ranks.is_alone() {
        return Ok(());
    }
    let [train, validation] =
        [&dataset.train, &dataset.validation].map(|set| source::fingerprint(set.as_ref()));
    let classes = dataset.classes.len();
    let (images, held_out) = (dataset.train.len(), dataset.validation.len());
    ranks.world.check_same(
        "data sets",
        &format!("{images} + {held_out} images of {classes} classes ({train:016x}, {validation:016x})"),
    )
}

/// Refuses, on every rank, weights that differ: each rank has read them by itself, perhaps from a copy of its own. Looks
/// at the beginning of each tensor, which training leaves in no two files alike.
fn check_weights(params: &[ParamSpec], state: &dyn StateSource, ranks: &MeshGroups) -> Result<()> {
    if ranks.is_alone() {
        return Ok(());
    }
    let beginning = |(param, spec): (usize, &ParamSpec)| {
        let whole = 0..spec.len().min(LOOKED_AT);
        Wanted { param, runs: std::iter::once(whole).collect() }
    };
    let wanted: Vec<Wanted> = params.iter().enumerate().map(beginning).collect();
    let read = ranks.agree(state.read(StateKind::Weights, &wanted))??;
    let step = state.optimizer_step();
    ranks.world.check_same("weights to begin with", &format!("{:016x} of step {step}", fingerprint(&read)))
}

/// The batches that this rank loads.
fn share(ranks: &MeshGroups) -> Share {
    Share { part: ranks.data.rank(), parts: ranks.data.size() }
}

/// The run's folder, which the first rank takes.
fn run_dir(ranks: &MeshGroups, take: impl FnOnce() -> Result<RunDir>) -> Result<RunDir> {
    let taken = ranks.agree(ranks.is_first().then(take).transpose())??;
    let path = taken.as_ref().map(|run| run.path().display().to_string());
    let path = ranks.first_text(path.as_deref())?.unwrap_or_default();
    Ok(taken.unwrap_or_else(|| RunDir::of_first_rank(Path::new(&path))))
}

/// What a run needs on this rank.
fn plan(target: &Target, recipe: &Recipe, step: &TrainStep) -> Result<RunPlan> {
    let slots = packing::slots(recipe);
    let fits = |device: &Device| {
        let place = target.ranks.place();
        check_fits(
            device.info(),
            device.free_bytes()? / target.sharing.max(1),
            recipe,
            step.classes(),
            slots,
            place,
        )
    };
    let memory = target.device.as_ref().map(fits).transpose()?;
    Ok(RunPlan::of(recipe, step, slots, memory))
}

/// The engine of a run with its weights. All ranks call it.
fn engine(
    target: &Target,
    recipe: &Recipe,
    step: TrainStep,
    state: &dyn StateSource,
) -> Result<Box<dyn Engine>> {
    let (ranks, slots) = (&target.ranks, packing::slots(recipe));
    let Some(device) = &target.device else {
        let engine = CpuEngine::new(recipe, step, slots, state, ranks.clone());
        return Ok(Box::new(ranks.agree(engine)??));
    };
    let connected = match ranks.is_alone() {
        true => None,
        false => Some(DeviceRanks::connect(ranks.clone(), device)?),
    };
    let made = || -> Result<DeviceEngine> {
        let place = (ranks.place().data, connected);
        let mut engine = DeviceEngine::on_mesh(device, recipe, step, slots, target.options, place)?;
        engine.load(state)?;
        Ok(engine)
    };
    Ok(Box::new(ranks.agree(made())??))
}

fn open_data(recipe: &Recipe) -> Result<Dataset> {
    source::of_recipe(recipe)
}
