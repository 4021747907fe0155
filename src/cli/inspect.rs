//! `trencadis inspect`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::{RecipeArgs, print, use_data};
use crate::autograd::Workload;
use crate::autograd::graph::Graph;
use crate::data::{inspect, preview, source};
use crate::error::{Error, Result};
use crate::models::{two_tower, vit};
use crate::recipe::{Recipe, Rope, RopeConfig};
use crate::train::plan::RunPlan;
use crate::train::terminal::mib;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Sizes, aspect ratios, classes, tokens per image and packing of a set of images.
    Data(Data),
    /// Draws how a recipe crops and augments images.
    Augment(Augment),
    /// Parameters, FLOPs and activation memory of a recipe's model.
    Model(Model),
    /// GPUs, driver and kernels that were found, and why not, where not.
    Device,
}

#[derive(Debug, clap::Args)]
pub(super) struct Data {
    /// Folder, tar shards, IDX or CIFAR files; the built-in digits where it is not given.
    #[arg(value_name = "PATH")]
    path: Option<String>,
    /// Recipe whose patch size, resolution and packing are used.
    #[arg(long, value_name = "RECIPE")]
    recipe: Option<String>,
    /// Override a key of the recipe; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Draw how the first images are packed.
    #[arg(long, value_name = "OUT.png")]
    preview: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Augment {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The picture.
    #[arg(long, value_name = "OUT.png", default_value = "augment.png")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Model {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Number of classes; asked of the data where it is not given.
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
    /// Print the recorded graph of the training step.
    #[arg(long)]
    graph: bool,
}

pub(super) fn run(command: Command) -> Result<()> {
    match command {
        Command::Data(args) => data(args),
        Command::Augment(args) => augment(args),
        Command::Model(args) => model(args),
        Command::Device => print(&crate::device::report()?),
    }
}

fn data(args: Data) -> Result<()> {
    let default = if args.path.is_some() { "photos" } else { "digits" };
    let name = args.recipe.as_deref().unwrap_or(default);
    args.preview.as_deref().map_or(Ok(()), |out| check_png("--preview", out))?;
    let mut recipe = Recipe::load(name, &args.sets)?;
    if let Some(path) = &args.path {
        use_data(&mut recipe, path)?;
    }
    let dataset = source::of_recipe(&recipe)?;
    let report = inspect::report(&dataset, &recipe, name)?;
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&report).map_err(Error::failure)?))?;
    } else {
        print(&format!("{report}\n"))?;
    }
    if let Some(out) = &args.preview {
        preview::preview(&dataset, &recipe, out)?;
        eprintln!("drawn             {}", out.display());
    }
    Ok(())
}

fn check_png(option: &str, out: &Path) -> Result<()> {
    if out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png")) {
        return Ok(());
    }
    Err(Error::usage(format!("{option} {}: the name must end in .png", out.display())))
}

fn augment(args: Augment) -> Result<()> {
    check_png("--out", &args.out)?;
    let (name, recipe) = args.recipe.load()?;
    let dataset = source::of_recipe(&recipe)?;
    preview::augmentations(&dataset, &recipe, &name, &args.out)?;
    eprintln!("drawn             {}", args.out.display());
    Ok(())
}

/// As in a recipe, in one line.
fn keys(rope: &RopeConfig) -> Result<String> {
    let table = toml::Table::try_from(rope).map_err(Error::failure)?;
    Ok(table.iter().map(|(key, value)| format!("{key} = {value}")).collect::<Vec<_>>().join(", "))
}

fn model(args: Model) -> Result<()> {
    let (name, recipe) = args.recipe.load()?;
    let classes = match args.classes {
        Some(0) => return Err(Error::usage("--classes must be at least 1")),
        Some(classes) => classes,
        None => source::of_recipe(&recipe)?.classes.len(),
    };
    let slots = crate::data::packing::slots(&recipe);
    let step = crate::train::step::TrainStep::new(&recipe, classes, slots)?;
    if args.graph {
        return print(&step.graph().render());
    }
    let mut forward = Graph::new();
    let tokens = recipe.packing.tokens;
    match recipe.text.is_on() {
        true => _ = two_tower::record(&mut forward, &recipe, tokens, slots, false)?,
        false => _ = vit::record(&mut forward, &recipe, classes, tokens, slots, false)?,
    }
    let dims = recipe.model.dimensions()?;
    let plan = RunPlan::of(&recipe, &step, slots, None);
    let mut text = String::new();
    let _ = writeln!(
        text,
        "model             {name}: width {}, depth {}, mlp {}, {} heads of {}{}, patch {}",
        dims.width,
        dims.depth,
        dims.mlp,
        dims.heads,
        dims.head_dim,
        if dims.kv_heads == dims.heads { String::new() } else { format!(" over {} kv heads", dims.kv_heads) },
        recipe.model.patch
    );
    if recipe.text.is_on() {
        let config = recipe.text_model()?;
        let dims = config.dimensions()?;
        let _ = writeln!(
            text,
            "text tower        width {}, depth {}, mlp {}, {} heads of {}, {} tokens known, texts of up to {}",
            dims.width,
            dims.depth,
            dims.mlp,
            dims.heads,
            dims.head_dim,
            config.position.rows,
            recipe.text.max_tokens
        );
    }
    let rope = recipe.model.rope.in_effect();
    if rope.kind != Rope::None {
        let _ = writeln!(text, "rotary positions  {}", keys(&rope)?);
    }
    let parameters = plan.parameters as f64 / 1e6;
    let _ = match recipe.text.is_on() {
        true => writeln!(text, "parameters        {parameters:.3} M, both towers"),
        false => writeln!(text, "parameters        {parameters:.3} M, {classes} classes"),
    };
    let side = if recipe.eval.resolution > 0 { recipe.eval.resolution } else { recipe.resolution.max };
    let n = (side / recipe.model.patch).max(1).pow(2) as f64 + recipe.model.prefix() as f64;
    let one = Workload { tokens: n, images: 1.0, sum_squared: n * n, texts: [0.0; 2] };
    let _ = writeln!(
        text,
        "forward           {:.3} GFLOP for a square image of {side} pixels ({n} tokens)",
        forward.flops(&one) / 1e9
    );
    let _ = writeln!(
        text,
        "step              {:.1} GFLOP for {} tokens",
        plan.flops_per_step / 1e9,
        plan.tokens * plan.accumulate
    );
    let _ = writeln!(text, "activations       {} of one batch at the peak", mib(plan.activation_bytes));
    for spec in step.params() {
        let shape: Vec<String> = spec.shape.iter().map(usize::to_string).collect();
        let _ = writeln!(text, "  {:36} [{}]", spec.name, shape.join(", "));
    }
    print(&text)
}
