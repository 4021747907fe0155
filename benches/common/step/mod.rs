//! Whole training steps of recipes on a GPU, and what each of their kernels takes.

pub mod profile;
pub mod training;

use std::cell::RefCell;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use trencadis::recipe::Recipe;
use trencadis::{Error, Result};

use super::gpu::{self, Gpu, table};
use super::shapes::{Shape, own};
use training::{Run, Training};

/// Recipes that are measured.
pub const RECIPES: [&str; 6] = ["digits", "photos", "vit-b16", "navit-b16", "deit3-b16", "navit-l16"];
/// Fewest steps of a sample: what the clock misses of its ends then weighs little.
const STEPS: usize = 5;
/// Samples of a recipe, the fewest that criterion takes. They are the last ones that it asks for.
const SAMPLES: usize = 10;
/// Batches that the steps go through.
const BATCHES: usize = 4;

/// Columns of the table of steps.
pub const HEADER: &str = "recipe,budget,tokens,images,milliseconds,tokens_per_s,images_per_s,model_tflop_per_s,\
                          share_of_mma,idle_between_steps,idle_between_kernels,memory_mib,samples,\
                          mma_tflop_per_s,device,driver,sm_mhz,memory_mhz,watts,celsius";

/// Classes of the data that a recipe is for.
pub fn classes(recipe: &str) -> usize {
    match recipe {
        "digits" => 10,
        "photos" => 101,
        _ => 1000,
    }
}

/// Recipes to measure and, where a person has said so, their tokens.
///
/// # Errors
/// Own shapes that cannot be read.
fn recipes() -> Result<Vec<(String, Option<usize>)>> {
    let Some(own) = own().map_err(Error::usage)? else {
        return Ok(RECIPES.map(|name| (name.into(), None)).into());
    };
    let steps = own.into_iter().filter_map(|shape| match shape {
        Shape::Step { recipe, tokens } => Some((recipe, Some(tokens))),
        _ => None,
    });
    Ok(steps.collect())
}

/// Measures the recipes on GPU 0 into `step.csv` and `step-profile.csv`, or says that there is none. A recipe that
/// fails does not keep the others from being measured.
pub fn bench(criterion: &mut Criterion) {
    let Some(gpu) = gpu::open("step") else { return };
    let mut measured = || -> Result<Option<Error>> {
        let tables = [gpu.begin("step", HEADER)?, gpu.begin("step-profile", profile::HEADER)?];
        let mut failed = None;
        for (name, tokens) in recipes()? {
            if let Err(error) = measure(criterion, &gpu, &name, tokens, &tables) {
                eprintln!("gpu_step/{name}: {error}");
                failed = Some(error);
            }
        }
        Ok(failed)
    };
    match measured() {
        Ok(None) => {}
        Ok(Some(error)) | Err(error) => gpu::fail("step", &error),
    }
}

/// Measures one recipe with criterion, which may pass it over.
fn measure(
    criterion: &mut Criterion,
    gpu: &Gpu,
    name: &str,
    tokens: Option<usize>,
    [steps, profiles]: &[table::Table; 2],
) -> Result<()> {
    let classes = classes(name);
    let sets: Vec<String> = tokens.iter().map(|tokens| format!("packing.tokens={tokens}")).collect();
    let recipe = training::fitting(&gpu.device, name, &sets, classes)?;
    let training = RefCell::new(None);
    let samples = RefCell::new(Vec::new());
    let failed = RefCell::new(None);
    let mut group = criterion.benchmark_group("gpu_step");
    group.sample_size(SAMPLES).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(3));
    group.throughput(Throughput::Elements(recipe.packing.tokens as u64));
    group.bench_function(BenchmarkId::new(name, recipe.packing.tokens), |bencher| {
        bencher.iter_custom(|steps| {
            let run = sample(gpu, &recipe, classes, &training, steps as usize);
            // Criterion cannot be told of an error.
            let seconds = run.map_or_else(
                |error| {
                    *failed.borrow_mut() = Some(error);
                    1.0
                },
                |run| {
                    let seconds = run.seconds / run.steps as f64;
                    samples.borrow_mut().push(run);
                    seconds
                },
            );
            Duration::from_secs_f64(seconds * steps as f64)
        });
    });
    group.finish();
    if let Some(error) = failed.into_inner() {
        return Err(error);
    }
    let samples = samples.into_inner();
    let (Some(training), Some(first)) = (training.into_inner(), samples.len().checked_sub(SAMPLES)) else {
        return Ok(());
    };
    let (line, profile) = lines(gpu, name, &training, &samples[first..])?;
    println!("{line}");
    steps.add(&line).map_err(Error::failure)?;
    profile.iter().try_for_each(|line| profiles.add(line)).map_err(Error::failure)
}

/// Some steps of the training, which begins with the first sample.
fn sample(
    gpu: &Gpu,
    recipe: &Recipe,
    classes: usize,
    training: &RefCell<Option<Training>>,
    steps: usize,
) -> Result<Run> {
    let mut training = training.borrow_mut();
    if training.is_none() {
        *training = Some(Training::open(&gpu.device, recipe, classes, BATCHES)?);
        gpu.clocks.restart();
    }
    match training.as_mut() {
        Some(training) => training.run(steps.max(STEPS)),
        None => Err(Error::failure("there is no training")),
    }
}

/// The lines of both tables: of the median of the samples, and of the parts of a step, timed now.
///
/// # Errors
/// A failed device.
pub fn lines(gpu: &Gpu, name: &str, training: &Training, samples: &[Run]) -> Result<(String, Vec<String>)> {
    // Before the parts run, whose clocks are others.
    let reading = gpu.reading();
    let mut sorted: Vec<&Run> = samples.iter().collect();
    sorted.sort_by(|a, b| (a.seconds / a.steps as f64).total_cmp(&(b.seconds / b.steps as f64)));
    let Some(run) = sorted.get(sorted.len() / 2) else { return Err(Error::failure("nothing was measured")) };
    let rows = profile::rows(gpu, training)?;
    let parts: f64 = rows.iter().map(|row| row.seconds).sum();
    let busy = (run.seconds - run.idle) / run.steps as f64;
    let (per_step, rate) = (|x: f64| x / run.steps as f64, |x: f64| x / run.seconds);
    let budget = training.recipe().packing.tokens;
    let cells = [
        name.into(),
        budget.to_string(),
        format!("{:.0}", per_step(run.tokens)),
        format!("{:.0}", per_step(run.images)),
        format!("{:.3}", 1e3 * per_step(run.seconds)),
        format!("{:.0}", rate(run.tokens)),
        format!("{:.0}", rate(run.images)),
        format!("{:.2}", rate(run.flops) / 1e12),
        format!("{:.3}", rate(run.flops) / gpu.peaks.operations),
        format!("{:.4}", rate(run.idle)),
        format!("{:.4}", 1.0 - parts / busy),
        (training.memory().total() >> 20).to_string(),
        samples.len().to_string(),
        format!("{:.1}", gpu.peaks.operations / 1e12),
        gpu.device.info().name.clone(),
    ];
    let line = table::csv(cells.into_iter().chain(table::clocks(&reading)));
    Ok((line, rows.iter().map(|row| profile::line(row, name, budget, parts)).collect()))
}
