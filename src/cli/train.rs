//! `trencadis train`.

use std::path::PathBuf;

use super::{RecipeArgs, print};
use crate::data::source;
use crate::device::{self, DeviceChoice};
use crate::error::{Error, Result};
use crate::train::plan::RunPlan;
use crate::train::start::{self, TrainOptions};
use crate::weights::Weights;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Start from these weights; the head starts afresh unless it knows the same classes.
    #[arg(long, value_name = "W.safetensors")]
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
    /// Print parameters, FLOPs and memory, and stop before anything is allocated.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    let device = device::select(args.device)?.cpu_only()?;
    if let Some(folder) = &args.resume {
        if args.dry_run {
            return Err(Error::usage("--dry-run goes with a recipe, not with --resume"));
        }
        print(&format!("device            {device}\n"))?;
        return start::resume(folder);
    }
    let (name, recipe) = args.recipe.load()?;
    if args.dry_run {
        if let Some(path) = &args.init {
            Weights::load_metadata(path)?;
        }
        let dataset = source::open(&recipe.data, recipe.model.channels, recipe.train.seed)?;
        let plan = RunPlan::new(&recipe, dataset.classes.len())?;
        return print(&format!("device            {device}\n{plan}\n"));
    }
    print(&format!("device            {device}\n"))?;
    start::start(TrainOptions { name: args.name.unwrap_or(name), recipe, out: args.out, init: args.init })
}
