//! A whole training step, forward, loss, backward, AdamW: of NaViT and ViT on the CPU device, and of the recipes on
//! a GPU.
//!
//! `cargo bench --bench step` measures both with criterion; throughput counts tokens. A step is one batch, whatever
//! the recipe accumulates.
//! `cargo bench --bench step -- --json --model navit --shape Ti --steps 3 --tokens 4096` runs a
//! fixed number of steps after one to warm up and prints one JSON line with tokens per second and
//! the process's peak memory: what `tools/compare_torch.py` asks for. `--matmul bf16` multiplies as the recipe key
//! `train.matmul` does.

use std::rc::Rc;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput};
use trencadis::data::batch::{PREFIX, PackedBatch, Patches, Targets};
use trencadis::nn::init::initialise;
use trencadis::parallel::MeshGroups;
use trencadis::recipe::Recipe;
use trencadis::rng::{Purpose, Stream};
use trencadis::train::engine::{CpuEngine, Engine, TrainState};
use trencadis::train::step::TrainStep;

mod common;

const CLASSES: usize = 1000;
const PATCH: usize = 16;

/// The recipe of `model` (navit or vit) at a shape, without what makes the work vary.
fn recipe(model: &str, shape: &str, tokens: usize, matmul: &str) -> Recipe {
    let sets = [
        format!("model.shape='{shape}'"),
        format!("packing.tokens={}", tokens.next_multiple_of(128)),
        "packing.kind='flat'".into(),
        "drop.kind='none'".into(),
        "train.loss='softmax'".into(),
        "train.accumulate=1".into(),
        format!("train.matmul='{matmul}'"),
    ];
    let name = if model == "vit" { "vit-b16" } else { "navit-b16" };
    Recipe::load(name, &sets).unwrap_or_else(|e| panic!("{e}"))
}

/// Images of random pixels: squares of 224 for ViT, else resolution uniform in 64..256 and aspect
/// ratio log-uniform in 1:2..2:1, as many as fit.
fn batch(model: &str, tokens: usize, prefix: usize, seed: u64) -> PackedBatch {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Resolution);
    let mut grids: Vec<[u16; 2]> = Vec::new();
    let mut used = 0;
    loop {
        let grid = if model == "vit" {
            [14, 14]
        } else {
            let side = (64.0 + 192.0 * stream.uniform()) / PATCH as f32;
            let aspect = (2.0 * stream.uniform() - 1.0).exp2().sqrt();
            [(side * aspect).round().max(1.0) as u16, (side / aspect).round().max(1.0) as u16]
        };
        let length = prefix + usize::from(grid[0]) * usize::from(grid[1]);
        if used + length > tokens {
            break;
        }
        used += length;
        grids.push(grid);
    }
    let (mut positions, mut cu_seqlens) = (Vec::new(), vec![0]);
    for &[rows, columns] in &grids {
        positions.extend(std::iter::repeat_n(PREFIX, prefix));
        positions.extend((0..rows).flat_map(|r| (0..columns).map(move |c| [r, c])));
        cu_seqlens.push(positions.len() as i32);
    }
    positions.resize(tokens.next_multiple_of(128), [0, 0]);
    let patch_dim = 3 * PATCH * PATCH;
    let pixels = (0..positions.len() * patch_dim).map(|_| stream.bits() as u8).collect();
    let images = grids.len();
    PackedBatch {
        patches: Patches::U8(pixels),
        patch_dim,
        cu_seqlens,
        positions,
        grids,
        targets: Targets::Classes((0..images).map(|i| (i * 37 % CLASSES) as i32).collect()),
        weights: vec![1.0; images],
        sample_ids: (0..images as u64).collect(),
        epochs: vec![0; images],
        images,
        texts: None,
    }
}

fn engine(recipe: &Recipe, slots: usize) -> CpuEngine {
    let step = TrainStep::new(recipe, CLASSES, slots).unwrap_or_else(|e| panic!("{e}"));
    let state = TrainState::fresh(initialise(step.params(), 0), false);
    CpuEngine::new(recipe, step, slots, &state, Rc::new(MeshGroups::alone()))
        .unwrap_or_else(|e| panic!("{e}"))
}

fn run(engine: &mut CpuEngine, batch: &PackedBatch) {
    let outcome = engine.queue(std::slice::from_ref(batch), 1e-4).and_then(|()| engine.collect());
    let outcome = outcome.unwrap_or_else(|e| panic!("{e}"));
    assert!(outcome.loss.is_finite() && outcome.grad_norm.is_finite());
}

fn measure(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    group.sample_size(10);
    for model in ["navit", "vit"] {
        for shape in ["Ti", "S"] {
            let recipe = recipe(model, shape, 4096, "f32");
            let batch = batch(model, 4096, recipe.model.prefix(), 0);
            let mut engine = engine(&recipe, batch.images);
            group.throughput(Throughput::Elements(batch.live_tokens() as u64));
            group.bench_function(BenchmarkId::new(model, shape), |b| b.iter(|| run(&mut engine, &batch)));
        }
    }
    group.finish();
}

/// `--name value` among the arguments.
fn argument(name: &str, default: &str) -> String {
    let mut arguments = std::env::args().skip_while(|a| a != name);
    arguments.nth(1).unwrap_or_else(|| default.into())
}

fn json() {
    let (model, shape) = (argument("--model", "navit"), argument("--shape", "Ti"));
    let number = |name, default| argument(name, default).parse::<usize>().expect("a number");
    let (steps, tokens) = (number("--steps", "3"), number("--tokens", "4096"));
    let recipe = recipe(&model, &shape, tokens, &argument("--matmul", "f32"));
    let batches: Vec<_> =
        (0..=steps).map(|i| batch(&model, tokens, recipe.model.prefix(), i as u64)).collect();
    let slots = batches.iter().map(|b| b.images).max().unwrap_or(1);
    let batches: Vec<_> = batches.into_iter().map(|b| with_slots(b, slots)).collect();
    let mut engine = engine(&recipe, slots);
    run(&mut engine, &batches[0]);
    let begun = Instant::now();
    batches[1..].iter().for_each(|b| run(&mut engine, b));
    let seconds = begun.elapsed().as_secs_f64();
    // Patch tokens alone: what the peers count too.
    let patches: usize =
        batches[1..].iter().map(|b| b.live_tokens() - b.images * recipe.model.prefix()).sum();
    println!(
        "{}",
        serde_json::json!({
            "model": format!("{model}-{}16", shape.to_lowercase()),
            "tokens_per_s": patches as f64 / seconds,
            "peak_rss_mib": peak_rss_mib(),
        })
    );
}

/// The batch with empty slots up to `slots`.
fn with_slots(mut batch: PackedBatch, slots: usize) -> PackedBatch {
    let last = batch.cu_seqlens[batch.images];
    batch.cu_seqlens.resize(slots + 1, last);
    batch.grids.resize(slots, [0, 0]);
    batch.targets = match batch.targets {
        Targets::Classes(mut classes) => {
            classes.resize(slots, 0);
            Targets::Classes(classes)
        }
        soft => soft,
    };
    batch.weights.resize(slots, 0.0);
    batch.sample_ids.resize(slots, 0);
    batch.epochs.resize(slots, 0);
    batch
}

/// Peak resident memory of this process; `None` where the system does not tell.
fn peak_rss_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}

fn main() {
    if std::env::args().any(|a| a == "--json") {
        return json();
    }
    let mut criterion = Criterion::default().configure_from_args();
    measure(&mut criterion);
    common::step::bench(&mut criterion);
    criterion.final_summary();
}
