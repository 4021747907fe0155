//! `trencadis profile`: what a step of a recipe consists of.

use std::path::PathBuf;

use super::{print, use_data};
use crate::data::pictures::loaded;
use crate::data::source;
use crate::device::{self, DeviceChoice};
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::recipe::Recipe;
use crate::train::profile::{Input, cpu, device as on_device, one_batch, trace};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Named recipe or path of a .toml file; see `trencadis recipes`.
    #[arg(value_name = "RECIPE", default_value = "digits")]
    recipe: String,
    /// Override a key, such as `packing.tokens=4096`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Where the step runs: auto takes GPU 0 if there is one, else the CPU.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Classes of the head.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    classes: u32,
    /// Also time the input: how fast batches of this set are made ready.
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Steps that are timed, after some to warm up.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Also write the timeline to FILE, for ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> Result<()> {
    let mut recipe = Recipe::load(&args.recipe, &args.sets)?;
    one_batch(&recipe)?;
    let selected = device::select(args.device)?;
    let input = match &args.data {
        Some(path) => {
            use_data(&mut recipe, path)?;
            let loaded = loaded(&recipe, selected.device.is_some());
            Some(Input::measure(&loaded, source::of_recipe(&recipe)?.train)?)
        }
        None => None,
    };
    let (classes, steps) = (args.classes as usize, args.steps as usize);
    let mut profile = match &selected.device {
        Some(device) => on_device::profile(&args.recipe, &recipe, device, classes, steps)?,
        None => cpu::profile(&args.recipe, &recipe, &selected.description, classes, steps)?,
    };
    profile.input = input;
    if let Some(path) = &args.trace {
        let text = trace(&profile).to_string();
        write_atomic(path, |to| to.write_all(text.as_bytes()))?;
    }
    match args.json {
        true => print(&format!("{}\n", serde_json::to_string(&profile).map_err(Error::failure)?)),
        false => print(&profile.to_string()),
    }
}
