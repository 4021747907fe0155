//! Steps over images and texts on every device that has kernels, beside the CPU device.

use std::rc::Rc;
use std::sync::Arc;

use trencadis::autograd::device::BatchShape;
use trencadis::autograd::graph::Modality;
use trencadis::data::batch::PackedBatch;
use trencadis::data::loader::{Loader, Share};
use trencadis::data::packing::slots;
use trencadis::data::source::of_recipe;
use trencadis::data::tokenizer::{BUILT_IN, Tokenizer};
use trencadis::device::DeviceInfo;
use trencadis::eval::towers::{CpuEmbed, CpuTowers, DeviceTowers, Embed};
use trencadis::nn::init::initialise;
use trencadis::parallel::{MeshGroups, Place};
use trencadis::recipe::Recipe;
use trencadis::train::engine::{CpuEngine, DeviceEngine, DeviceMemory, DeviceOptions, Engine, TrainState};
use trencadis::train::step::{StepOutcome, TrainStep};

use super::recipe;
use super::support::devices::devices;
use super::support::numbers::distance;

const RATE: f64 = 0.01;

fn small(sets: &[&str]) -> Recipe {
    let small = ["text.width=16", "packing.images=8", "packing.tokens=128", "train.ema=0.9"];
    let mut recipe = recipe(&[&small[..], sets].concat());
    recipe.text.vocabulary = Tokenizer::open(BUILT_IN).unwrap().vocabulary();
    recipe
}

fn batches(recipe: &Recipe, count: usize) -> Vec<PackedBatch> {
    let data = of_recipe(recipe).unwrap();
    let mut loader = Loader::train_share(data.train, recipe, None, Share::ALL).unwrap();
    (0..count).map(|_| loader.next_batch().unwrap().batch).collect()
}

fn weights(recipe: &Recipe) -> Vec<Vec<f32>> {
    let step = TrainStep::new(recipe, 10, slots(recipe)).unwrap();
    // Larger than fresh ones, so that there is something to tell apart.
    let grown =
        |values: Vec<f32>| values.into_iter().map(|x| if x.abs() < 0.1 { 5.0 * x } else { x }).collect();
    initialise(step.params(), 3).into_iter().map(grown).collect()
}

/// Outcomes, and the weights afterwards.
fn train(engine: &mut dyn Engine, batches: &[PackedBatch]) -> (Vec<StepOutcome>, Vec<Vec<f32>>) {
    let mut outcomes = Vec::new();
    for batch in batches {
        engine.queue(std::slice::from_ref(batch), RATE).unwrap();
        outcomes.push(engine.collect().unwrap());
    }
    (outcomes, engine.state().unwrap().weights.to_vec())
}

fn cpu_engine(recipe: &Recipe) -> CpuEngine {
    let (slots, ranks) = (slots(recipe), Rc::new(MeshGroups::alone()));
    let step = TrainStep::new(recipe, 10, slots).unwrap();
    CpuEngine::new(recipe, step, slots, &TrainState::fresh(weights(recipe), true), ranks).unwrap()
}

/// Losses, retrieval and updates are those of the CPU up to bf16; by graph and by single launches they are the same bits;
/// a locked image tower keeps its own.
#[test]
fn steps_are_those_of_the_cpu() {
    for sets in
        [&["contrastive.loss=softmax"][..], &["contrastive.loss=sigmoid"], &["contrastive.lock_image=true"]]
    {
        let recipe = small(sets);
        let batches = batches(&recipe, 4);
        let (want, after) = train(&mut cpu_engine(&recipe), &batches);
        let before = weights(&recipe);
        for device in devices() {
            let run = |no_graph| {
                let step = TrainStep::new(&recipe, 10, slots(&recipe)).unwrap();
                let options = DeviceOptions { no_graph };
                let mut engine = DeviceEngine::new(&device, &recipe, step, slots(&recipe), options).unwrap();
                engine.load(&TrainState::fresh(before.clone(), true)).unwrap();
                train(&mut engine, &batches)
            };
            let (outcomes, found) = run(false);
            for (step, (outcome, want)) in outcomes.iter().zip(&want).enumerate() {
                // Adam's first steps are the gradients' signs, which rounding turns where there is hardly any.
                let most = if step == 0 { 0.03 } else { 0.15 };
                assert!(
                    (outcome.loss - want.loss).abs() < most * want.loss.max(0.5),
                    "{sets:?}, step {step}: {outcome:?} {want:?}"
                );
                let norms = [outcome.grad_norm, want.grad_norm];
                assert!(step > 0 || (norms[0] / norms[1] - 1.0).abs() < 0.05, "{sets:?}: norms {norms:?}");
                assert_eq!((outcome.images, outcome.tokens), (want.images, want.tokens));
                assert!((outcome.accuracy - want.accuracy).abs() < 0.3, "{sets:?}: {outcome:?} {want:?}");
            }
            let flat = |a: &[Vec<f32>]| -> Vec<f64> {
                a.iter()
                    .zip(&before)
                    .flat_map(|(a, b)| a.iter().zip(b).map(|(a, b)| f64::from(a - b)))
                    .collect()
            };
            let far = distance(&flat(&found), &flat(&after));
            assert!(far < 0.2, "{sets:?}: {far}");
            assert_eq!(run(true).1, found, "launched one by one");
            let step = TrainStep::new(&recipe, 10, slots(&recipe)).unwrap();
            for ((spec, found), before) in step.params().iter().zip(&found).zip(&before) {
                let locked = sets[0].contains("lock")
                    && !spec.name.starts_with("text.")
                    && !spec.name.starts_with("contrastive.");
                assert_eq!(found == before, locked, "{sets:?} {}", spec.name);
            }
        }
    }
}

/// Vectors of both towers, each run by itself.
#[test]
fn vectors_are_those_of_the_cpu() {
    let recipe = small(&[]);
    let batch = &batches(&recipe, 1)[0];
    let mut cpu = CpuEmbed {
        towers: CpuTowers::new(&recipe, batch.tokens(), batch.slots()).unwrap(),
        params: weights(&recipe),
    };
    for device in devices() {
        let shape = BatchShape::of_recipe(&recipe, slots(&recipe), 0);
        let mut towers = DeviceTowers::new(&device, &recipe, shape, &weights(&recipe)).unwrap();
        for modality in [Modality::Images, Modality::Texts] {
            let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let want = wide(cpu.embed(modality, batch).unwrap());
            let found = wide(towers.embed(modality, batch).unwrap());
            let far = distance(&found, &want);
            assert!(far < 1e-3, "{modality:?}: {far}");
        }
        let (found, want) = (towers.score().unwrap(), cpu.score().unwrap());
        assert_eq!(found, want);
    }
}

/// What a run takes is known before there is a device, and a text takes its part.
#[test]
fn memory_is_planned() {
    let plan = |recipe: &Recipe| {
        DeviceMemory::plan(&DeviceInfo::h100(), recipe, 10, slots(recipe), Place::default()).unwrap()
    };
    let (short, long) = (plan(&small(&["text.max_tokens=16"])), plan(&small(&["text.max_tokens=32"])));
    assert!(long.activations > short.activations && long.input > short.input, "{short:?} {long:?}");
    let tokenizer = Arc::new(Tokenizer::open(BUILT_IN).unwrap());
    assert!(
        long.state - short.state >= 4 * 16 * 16,
        "places of {} tokens: {short:?} {long:?}",
        tokenizer.vocabulary()
    );
}
