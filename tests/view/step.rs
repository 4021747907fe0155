//! Whole steps: where patches are made changes no bit of what is trained.

use std::sync::Arc;

use trencadis::data::loader::Loader;
use trencadis::data::packing;
use trencadis::data::source::Source;
use trencadis::device::{Device, DeviceInfo};
use trencadis::nn::init::initialise;
use trencadis::parallel::Place;
use trencadis::recipe::*;
use trencadis::train::engine::{DeviceEngine, DeviceMemory, DeviceOptions, Engine, TrainState};
use trencadis::train::step::TrainStep;

use crate::batches;
use crate::support::devices::devices;
use crate::support::synthetic::Synthetic;

const CLASSES: usize = 10;

fn recipe(views: ViewsKind) -> Recipe {
    let mut recipe = batches::recipe();
    let model = &mut recipe.model;
    (model.shape, model.width, model.depth, model.mlp, model.heads) = (String::new(), 32, 1, 48, 2);
    model.class_token = true;
    recipe.mix.mixup = 0.8;
    recipe.augment.color_jitter = 0.3;
    recipe.data.views = views;
    recipe
}

/// Losses and norms of the gradients of some steps, and the weights.
fn train(device: &Device, views: ViewsKind) -> (Vec<[u64; 2]>, Vec<Vec<f32>>) {
    let recipe = recipe(views);
    let source: Arc<dyn Source> = Arc::new(Synthetic::new(40, 0.4, 2.5));
    let mut loader = Loader::train(source, &recipe, None).unwrap();
    let slots = packing::slots(&recipe);
    let step = TrainStep::new(&recipe, CLASSES, slots).unwrap();
    let state = TrainState::fresh(initialise(step.params(), 3), false);
    let mut engine = DeviceEngine::new(device, &recipe, step, slots, DeviceOptions::default()).unwrap();
    engine.load(&state).unwrap();
    let mut told = Vec::new();
    for _ in 0..4 {
        engine.queue(&[loader.next_batch().unwrap().batch], 0.01).unwrap();
        let outcome = engine.collect().unwrap();
        told.push([outcome.loss, outcome.grad_norm].map(f64::to_bits));
    }
    (told, engine.state().unwrap().weights.to_vec())
}

#[test]
fn a_step_has_the_same_bits() {
    for device in devices().into_iter().take(1) {
        let (host, there) = (train(&device, ViewsKind::Host), train(&device, ViewsKind::Device));
        assert!(host.0.iter().all(|[loss, norm]| f64::from_bits(*loss) > 0.0 && f64::from_bits(*norm) > 0.0));
        assert!(host == there, "{:?} instead of {:?}", there.0, host.0);
    }
}

#[test]
fn memory_is_counted() {
    let info = DeviceInfo::h100();
    let plan = |recipe: &Recipe| {
        let slots = packing::slots(recipe);
        DeviceMemory::plan(&info, recipe, CLASSES, slots, Place::default()).unwrap()
    };
    let [host, device] = [ViewsKind::Host, ViewsKind::Device].map(recipe);
    let (tokens, patch) = (128, 3 * 8 * 8);
    let (there, here) = (plan(&device), plan(&host));
    // Two places, each with 16 times the patches of mixed images, and two targets of 8 times as many in the workspace.
    assert!(there.input - here.input > 2 * 15 * tokens * patch, "{} and {}", there.input, here.input);
    assert!(there.workspace >= 8 * tokens * patch, "{}", there.workspace);
    assert_eq!(
        (there.state, there.activations, there.evaluation),
        (here.state, here.activations, here.evaluation)
    );
    let mut plain = device.clone();
    plain.mix.mixup = 0.0;
    assert!(plan(&plain).input < there.input);
}
