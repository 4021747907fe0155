//! `trencadis eval`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

mod suite;

use super::{ModelArgs, print, use_data};
use crate::data::loader::LoaderReport;
use crate::data::source::{self, Dataset, Source};
use crate::device::{self, DeviceChoice};
use crate::error::{Error, Result};
use crate::eval::retrieval::retrieval;
use crate::eval::run::evaluate;
use crate::eval::trained::Trained;
use crate::recipe::{MAX_SIDE, Recipe};

/// Classes that the report names as the hardest.
const HARDEST: usize = 5;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Run folder, checkpoint, or weights of another program.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Other data with the same classes; the data it was trained on where it is not given.
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Resolutions in pixels, such as `128,224`; the recipe's where it is not given.
    #[arg(long, alias = "resolutions", value_name = "PIXELS", value_delimiter = ',')]
    resolution: Vec<usize>,
    /// Print one JSON object a resolution, or a suite.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    told: ModelArgs,
    /// Device to run on.
    #[arg(long, value_enum, default_value_t)]
    device: DeviceChoice,
    #[command(flatten)]
    suites: suite::SuiteArgs,
}

/// The set at `data`, or else the one that the recipe names.
fn dataset(recipe: &Recipe, data: Option<&str>) -> Result<Dataset> {
    let mut recipe = recipe.clone();
    match data {
        Some(path) => {
            use_data(&mut recipe, path)?;
            source::of_recipe_for_eval(&recipe)
        }
        None => source::of_recipe(&recipe),
    }
}

/// Pixels at which images are seen, where so many are asked for, or 0.
fn seen_at(recipe: &Recipe, resolution: usize) -> usize {
    match (resolution, recipe.eval.resolution) {
        (0, 0) => recipe.resolution.max,
        (0, set) => set,
        (asked, _) => asked,
    }
}

fn unreadable(loading: &LoaderReport) -> String {
    match loading.examples.first().filter(|_| loading.unreadable > 0) {
        Some(first) => format!("unreadable        {}, the first: {first}\n", loading.unreadable),
        None => String::new(),
    }
}

/// Of a model of texts whose data had no classes: how well it finds the texts of `images`.
fn find_texts(
    trained: &mut Trained,
    images: Arc<dyn Source>,
    resolution: usize,
    json: bool,
) -> Result<String> {
    let mut recipe = trained.recipe.clone();
    recipe.eval.resolution = seen_at(&recipe, resolution);
    if images.is_empty() {
        return Err(Error::usage("there are no validation images to evaluate on; name others with --data"));
    }
    let path = trained.path.display().to_string();
    let (towers, tokenizer) =
        trained.model.towers().ok_or_else(|| Error::failure("the model has no towers"))?;
    let found = retrieval(towers, images, &recipe, tokenizer, &|| false)?;
    let Some((metrics, loading)) = found else { return Ok(String::new()) };
    if json {
        let line = serde_json::json!({
            "model": path, "resolution": recipe.eval.resolution, "images": metrics.images, "unreadable": loading.unreadable,
            "retrieval": metrics.top1, "loss": metrics.loss,
        });
        return Ok(format!("{line}\n"));
    }
    Ok(format!(
        "model             {path}\nresolution        {}\nimages            {}\n{}retrieval         {:.2} % of the images have a \
         higher score with their own text than with any other of their batch\nloss              {:.4}\nclasses           none in \
         the data; to tell some by their names: trencadis eval MODEL --suite zero-shot --data PATH\n",
        recipe.eval.resolution,
        metrics.images,
        unreadable(&loading),
        100.0 * metrics.top1,
        metrics.loss
    ))
}

pub(super) fn run(args: Args) -> Result<()> {
    if let Some(pixels) = args.resolution.iter().find(|pixels| **pixels > MAX_SIDE) {
        return Err(Error::usage(format!(
            "--resolution {pixels}: a resolution is at most {MAX_SIDE} pixels"
        )));
    }
    let device = device::select(args.device)?.device;
    if !args.suites.suite.is_empty() {
        return suite::run(args, device.as_ref());
    }
    let highest = args.resolution.iter().copied().max().unwrap_or(0);
    let mut trained = Trained::load(&args.model, &args.told.told(None)?, device.as_ref(), highest)?;
    let recipe = trained.recipe.clone();
    let dataset = dataset(&recipe, args.data.as_deref())?;
    let resolutions = if args.resolution.is_empty() { vec![0] } else { args.resolution };
    if trained.model.classes() == 0 {
        return resolutions.into_iter().try_for_each(|resolution| {
            print(&find_texts(&mut trained, dataset.validation.clone(), resolution, args.json)?)
        });
    }
    let images = dataset.match_classes(&trained.classes)?;
    for resolution in resolutions {
        let source = images.clone();
        let done = evaluate(trained.model.as_mut(), source, &recipe, resolution, &|| false)?;
        let Some(done) = done else { continue };
        let m = &done.metrics;
        let shown = seen_at(&recipe, resolution);
        if args.json {
            let mut line = serde_json::json!({
                "model": trained.path.display().to_string(), "resolution": shown, "tokens_per_image": done.tokens_per_image,
                "gflop_per_image": done.flops_per_image / 1e9, "unreadable": done.loading.unreadable,
                "downscaled": done.packing.downscaled,
            });
            if let (Some(line), Ok(serde_json::Value::Object(metrics))) =
                (line.as_object_mut(), serde_json::to_value(m))
            {
                line.extend(metrics);
            }
            print(&format!("{line}\n"))?;
            continue;
        }
        let mut text = String::new();
        let _ = writeln!(text, "model             {}", trained.path.display());
        let _ = writeln!(
            text,
            "resolution        {shown} ({:.1} tokens, {:.3} GFLOP an image)",
            done.tokens_per_image,
            done.flops_per_image / 1e9
        );
        let _ = writeln!(text, "images            {}", m.images);
        if done.packing.downscaled > 0 {
            let _ = writeln!(
                text,
                "downscaled        {}: at this resolution they have no place in packing.tokens or the position tables",
                done.packing.downscaled
            );
        }
        text += &unreadable(&done.loading);
        let _ = writeln!(text, "top-1             {:.2} %", 100.0 * m.top1);
        if trained.classes.len() > 5 {
            let _ = writeln!(text, "top-5             {:.2} %", 100.0 * m.top5);
        }
        let _ = writeln!(text, "loss              {:.4}", m.loss);
        let mut hardest: Vec<(f64, usize)> =
            m.per_class.iter().enumerate().filter_map(|(i, (top1, _))| top1.map(|t| (t, i))).collect();
        hardest.sort_by(|a, b| a.0.total_cmp(&b.0));
        let named: Vec<String> = hardest
            .iter()
            .take(HARDEST)
            .map(|(top1, i)| format!("{} {:.0} %", trained.classes[*i], 100.0 * top1))
            .collect();
        let _ = writeln!(text, "hardest classes   {}", named.join(", "));
        print(&text)?;
    }
    Ok(())
}
