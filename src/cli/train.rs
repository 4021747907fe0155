//! `trencadis train`.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use super::ranks::RankArgs;
use super::{RecipeArgs, print};
use crate::data::{packing, source};
use crate::device::{DeviceChoice, DeviceInfo, Selected};
use crate::error::{Error, Result};
use crate::parallel::MeshGroups;
use crate::train::engine::{DeviceOptions, check_fits};
use crate::train::plan::RunPlan;
use crate::train::start::{self, Target, TrainOptions};
use crate::train::step::TrainStep;
use crate::weights::Tensors;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Start from these weights, or the best of a run; the head starts afresh unless it knows the same classes.
    #[arg(long, value_name = "RUN|W.safetensors")]
    init: Option<PathBuf>,
    /// Continue this run folder exactly where it was saved last.
    #[arg(long, value_name = "RUN", conflicts_with_all = ["recipe", "data", "sets", "init", "name", "out"])]
    resume: Option<PathBuf>,
    /// Name of the run folder; the recipe's name where it is not given.
    #[arg(long)]
    name: Option<String>,
    /// Where run folders are made.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    out: PathBuf,
    /// Device to train on.
    #[arg(long, value_enum, default_value_t)]
    device: DeviceChoice,
    #[command(flatten)]
    ranks: RankArgs,
    /// On a GPU, launch every kernel by itself instead of whole steps as graphs: slower, for debugging.
    #[arg(long)]
    no_graph: bool,
    /// Print parameters, FLOPs and memory, and stop before anything is allocated.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    if args.dry_run {
        return dry_run(&args);
    }
    let args = Arc::new(args);
    let shared = args.clone();
    args.ranks.run(args.device, move |ranks, device, sharing| train(&shared, ranks, device, sharing))
}

/// On one rank.
fn train(args: &Args, ranks: Rc<MeshGroups>, selected: Result<Selected>, sharing: usize) -> Result<()> {
    let selected = selected.and_then(|selected| match selected.device {
        None if args.no_graph => {
            Err(Error::usage("--no-graph goes with a GPU; the CPU has no graphs, so leave it out"))
        }
        _ => Ok(selected),
    });
    let Selected { device, description } = ranks.agree(selected)??;
    let told = || match ranks.is_first() {
        true => print(&format!("device            {description}\n")),
        false => Ok(()),
    };
    let options = DeviceOptions { no_graph: args.no_graph };
    let target = Target { device, sharing, options, ranks: ranks.clone() };
    if let Some(folder) = &args.resume {
        told()?;
        return start::resume(folder, &target);
    }
    let (name, recipe) = ranks.agree(args.recipe.load())??;
    told()?;
    let name = args.name.clone().unwrap_or(name);
    let options = TrainOptions { name, recipe, out: args.out.clone(), init: args.init.clone() };
    start::start(options, &target)
}

fn dry_run(args: &Args) -> Result<()> {
    if args.resume.is_some() {
        return Err(Error::usage("--dry-run goes with a recipe, not with --resume"));
    }
    let (mesh, first) = args.ranks.mesh()?;
    let (_, recipe) = args.recipe.load()?;
    start::check_mesh(&recipe, mesh)?;
    start::check_lock(&recipe, args.init.is_some())?;
    if let Some(path) = &args.init {
        Tensors::load_metadata(path)?;
    }
    let dataset = source::of_recipe(&recipe)?;
    let classes = dataset.classes.len();
    let (description, info, free) = match args.ranks.first_device(args.device) {
        Ok((Selected { device: None, description }, _)) => (description, None, 0),
        Ok((Selected { device: Some(device), description }, sharing)) => {
            (description, Some(device.info().clone()), device.free_bytes()? / sharing)
        }
        // A plan for a GPU needs none.
        Err(_) if args.device == DeviceChoice::Cuda => {
            let info = DeviceInfo::h100();
            let description = format!("{}, assumed as there is no GPU to be used here", info.name);
            (description, Some(info.clone()), info.memory_bytes)
        }
        Err(reason) => return Err(reason),
    };
    let (slots, place) = (packing::slots(&recipe), mesh.place(0));
    let memory = info.map(|info| check_fits(&info, free, &recipe, classes, slots, place)).transpose()?;
    let plan =
        RunPlan::of(&recipe, &TrainStep::of_shard(&recipe, classes, slots, place.tensor)?, slots, memory);
    if !first {
        return Ok(());
    }
    let shared = match mesh.world() {
        1 => String::new(),
        _ => format!("{}\n", start::mesh_line(&recipe, mesh)),
    };
    print(&format!("device            {description}\n{plan}\n{shared}"))
}
