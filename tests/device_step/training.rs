//! Steps one after another, with the optimiser: the engine of a device beside that of the CPU.

use std::rc::Rc;

use trencadis::autograd::ParamSpec;
use trencadis::autograd::graph::Init;
use trencadis::data::batch::PackedBatch;
use trencadis::device::Device;
use trencadis::nn::init::initialise;
use trencadis::parallel::{MeshGroups, Place};
use trencadis::recipe::*;
use trencadis::train::engine::{CpuEngine, DeviceEngine, DeviceMemory, DeviceOptions, Engine, TrainState};
use trencadis::train::step::{StepOutcome, TrainStep};

use crate::case::*;
use crate::support::batch;
use crate::support::devices::devices;
use crate::support::numbers::distance;

const SLOTS: usize = 7;

fn alone() -> Rc<MeshGroups> {
    Rc::new(MeshGroups::alone())
}

const RATE: f64 = 0.01;
const GRAPHS: DeviceOptions = DeviceOptions { no_graph: false };

fn recipe(model: &ModelConfig) -> Recipe {
    let mut recipe = Recipe { model: model.clone(), ..Recipe::default() };
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    recipe.packing.tokens = TOKENS;
    recipe.resolution.max = 20;
    // A decay that would be missed.
    recipe.train = TrainConfig { weight_decay: 2.0, clip: 1.0, ema: 0.9, seed: 5, ..TrainConfig::default() };
    recipe
}

fn step(recipe: &Recipe) -> TrainStep {
    TrainStep::new(recipe, CLASSES, SLOTS).unwrap()
}

/// Weights as a run begins with them, with some of everything that it begins without.
fn begin(recipe: &Recipe) -> TrainState<'static> {
    let step = step(recipe);
    let noise = |param: &ParamSpec| ParamSpec { init: Init::Normal(0.1), ..param.clone() };
    let noise: Vec<ParamSpec> = step.params().iter().map(noise).collect();
    let mut weights = initialise(step.params(), 3);
    for (weights, noise) in weights.iter_mut().flatten().zip(initialise(&noise, 4).into_iter().flatten()) {
        *weights += noise;
    }
    TrainState::fresh(weights, true)
}

/// The batches of a few steps; the second step has two.
fn steps(model: &ModelConfig) -> Vec<Vec<PackedBatch>> {
    let make = |grids: &[[u16; 2]]| {
        batch(grids, model.prefix(), model.patch_dim(), CLASSES, TOKENS, SLOTS - grids.len())
    };
    let mut half = make(&GRIDS[1..4]);
    half.weights[1] = 0.5;
    vec![vec![make(&GRIDS[..3])], vec![half, make(&GRIDS)], vec![make(&GRIDS[2..])], vec![make(&GRIDS[3..])]]
}

fn device_engine(device: &Device, recipe: &Recipe, options: DeviceOptions) -> DeviceEngine {
    let mut engine = DeviceEngine::new(device, recipe, step(recipe), SLOTS, options).unwrap();
    engine.load(&begin(recipe)).unwrap();
    engine
}

/// Runs the steps with as many under way as the engine takes.
fn run(engine: &mut dyn Engine, steps: &[Vec<PackedBatch>]) -> Vec<StepOutcome> {
    let mut outcomes = Vec::new();
    for (i, batches) in steps.iter().enumerate() {
        engine.queue(batches, RATE).unwrap();
        if i + 1 >= engine.depth() {
            outcomes.push(engine.collect().unwrap());
        }
    }
    while outcomes.len() < steps.len() {
        outcomes.push(engine.collect().unwrap());
    }
    assert!(engine.collect().is_err(), "nothing is left");
    outcomes
}

/// All values of a state in one row.
fn all(values: &[Vec<f32>]) -> Vec<f64> {
    values.iter().flatten().map(|&x| f64::from(x)).collect()
}

/// The elements of a parameter that can be compared. Without a rotation a bias on k cancels in the softmax: its gradient
/// is rounding, which Adam makes as large as any.
fn counted(model: &ModelConfig, spec: &ParamSpec, values: &[f32]) -> Vec<f64> {
    let dims = model.dimensions().unwrap();
    let of_k = dims.heads * dims.head_dim..(dims.heads + dims.kv_heads) * dims.head_dim;
    let cancels = |i: usize| match spec.name.rsplit_once("attn.").map(|(_, name)| name) {
        _ if model.rope.kind != Rope::None => false,
        Some("k_norm.bias") => true,
        Some("qkv.bias") => of_k.contains(&i),
        _ => false,
    };
    values.iter().enumerate().filter(|(i, _)| !cancels(*i)).map(|(_, &x)| f64::from(x)).collect()
}

/// Loss, accuracy, gradient norm and every parameter of several steps, with accumulated batches, moving average and
/// stochastic depth, for every kind of block.
#[test]
fn training_follows_the_cpu() {
    for (name, model) in variants() {
        let (recipe, steps) = (recipe(&model), steps(&model));
        let mut cpu = CpuEngine::new(&recipe, step(&recipe), SLOTS, &begin(&recipe), alone()).unwrap();
        let wanted = run(&mut cpu, &steps);
        let specs = cpu.params().to_vec();
        let cpu = cpu.state().unwrap();
        for device in devices() {
            let start = std::time::Instant::now();
            let mut engine = device_engine(&device, &recipe, GRAPHS);
            let got = run(&mut engine, &steps);
            for (got, want) in got.iter().zip(&wanted) {
                let close = |a: f64, b: f64| (a - b).abs() <= 0.01 * b.abs();
                assert!(close(got.loss, want.loss), "{name}: loss {} and {}", got.loss, want.loss);
                assert!(close(got.grad_norm, want.grad_norm), "{name}: {} {}", got.grad_norm, want.grad_norm);
                let counts = |o: &StepOutcome| (o.images, o.tokens, o.budget, o.flops.to_bits());
                assert_eq!(counts(got), counts(want));
                // An image or two may stand at the edge of being recognised.
                assert!((got.accuracy - want.accuracy).abs() <= 0.34, "{name}");
                assert!(got.idle.is_some_and(|seconds| seconds >= 0.0));
            }
            let state = engine.state().unwrap();
            assert_eq!(state.optimizer_step, steps.len() as u64);
            let mut worst = (0.0f64, "");
            for (i, spec) in specs.iter().enumerate() {
                let [got, want] = [&state, &cpu].map(|state| counted(&model, spec, &state.weights[i]));
                let apart = distance(&got, &want);
                worst = if apart > worst.0 { (apart, &spec.name) } else { worst };
            }
            println!(
                "{name} on {}: {:.1e} apart ({}), {:?}",
                device.info().name,
                worst.0,
                worst.1,
                start.elapsed()
            );
            assert!(worst.0 < 3e-3, "{name}: {} is {:.1e} apart", worst.1, worst.0);
            let ema = |state: &TrainState<'_>| all(state.ema.as_deref().unwrap());
            assert!(distance(&ema(&state), &ema(&cpu)) < 1e-4, "{name}");
            assert!(distance(&all(&state.m), &all(&cpu.m)) < 1e-2, "{name}");
            assert!(distance(&all(&state.v), &all(&cpu.v)) < 1e-2, "{name}");
        }
    }
}

/// Replayed graphs and plain launches give the same bits, whatever ran before.
#[test]
fn replayed_steps_are_plain_steps() {
    let (_, model) = &variants()[2];
    let recipe = recipe(model);
    for device in devices() {
        // Weeks of emulation are a second of a GPU.
        let rounds = if device.info().driver.is_some() { 5 } else { 1 };
        let steps: Vec<_> = (0..rounds).flat_map(|_| steps(model)).collect();
        let mut plain = device_engine(&device, &recipe, DeviceOptions { no_graph: true });
        let mut replayed = device_engine(&device, &recipe, GRAPHS);
        let told = |outcomes: Vec<StepOutcome>| -> Vec<[u64; 3]> {
            let bits = |o: StepOutcome| [o.loss, o.grad_norm, o.accuracy].map(f64::to_bits);
            outcomes.into_iter().map(bits).collect()
        };
        let outcomes = told(run(&mut plain, &steps));
        assert_eq!(outcomes, told(run(&mut replayed, &steps)));
        assert!(plain.state().unwrap() == replayed.state().unwrap());
        // The same engine once more: nothing is left over from the steps before.
        replayed.load(&begin(&recipe)).unwrap();
        assert_eq!(outcomes, told(run(&mut replayed, &steps)));
        assert!(plain.state().unwrap() == replayed.state().unwrap());
    }
}

/// A state that was read goes on with the same bits on the same device, and on others as closely as they compute.
#[test]
fn a_state_goes_on_anywhere() {
    let (_, model) = &variants()[0];
    let (recipe, steps) = (recipe(model), steps(model));
    for device in devices() {
        let mut whole = device_engine(&device, &recipe, GRAPHS);
        let outcomes = run(&mut whole, &steps);
        let mut first = device_engine(&device, &recipe, GRAPHS);
        run(&mut first, &steps[..2]);
        let between = first.state().unwrap();
        let mut second = DeviceEngine::new(&device, &recipe, step(&recipe), SLOTS, GRAPHS).unwrap();
        second.load(&between).unwrap();
        assert!(second.state().unwrap() == between, "what is written is what is read");
        let rest = run(&mut second, &steps[2..]);
        for (rest, outcome) in rest.iter().zip(&outcomes[2..]) {
            assert_eq!((rest.loss, rest.grad_norm), (outcome.loss, outcome.grad_norm));
        }
        assert!(second.state().unwrap() == whole.state().unwrap());

        let mut cpu = CpuEngine::new(&recipe, step(&recipe), SLOTS, &between, alone()).unwrap();
        run(&mut cpu, &steps[2..]);
        let (cpu, whole) = (cpu.state().unwrap(), whole.state().unwrap());
        assert!(distance(&all(&cpu.weights), &all(&whole.weights)) < 1e-4);
    }
}

/// LAMB as the CPU takes it, and from a state that was read with the bits of the training that it was read from.
#[test]
fn lamb_follows_the_cpu_and_goes_on() {
    let (_, model) = &variants()[0];
    let (mut recipe, steps) = (recipe(model), steps(model));
    recipe.train.optimizer = OptimizerKind::Lamb;
    // One of 2 would be most of an update whose length is that of the parameter.
    recipe.train.weight_decay = 0.2;
    let mut cpu = CpuEngine::new(&recipe, step(&recipe), SLOTS, &begin(&recipe), alone()).unwrap();
    let wanted = run(&mut cpu, &steps);
    let specs = cpu.params().to_vec();
    let cpu = cpu.state().unwrap();
    for device in devices() {
        let mut engine = device_engine(&device, &recipe, GRAPHS);
        let mut got = run(&mut engine, &steps[..2]);
        let between = engine.state().unwrap();
        let rest = run(&mut engine, &steps[2..]);
        let mut second = DeviceEngine::new(&device, &recipe, step(&recipe), SLOTS, GRAPHS).unwrap();
        second.load(&between).unwrap();
        let told = |outcomes: &[StepOutcome]| -> Vec<[u64; 2]> {
            outcomes.iter().map(|o| [o.loss, o.grad_norm].map(f64::to_bits)).collect()
        };
        assert_eq!(told(&run(&mut second, &steps[2..])), told(&rest));
        assert!(second.state().unwrap() == engine.state().unwrap());

        got.extend(rest);
        for (got, want) in got.iter().zip(&wanted) {
            assert!((got.loss - want.loss).abs() <= 0.01 * want.loss, "loss {} and {}", got.loss, want.loss);
        }
        let state = engine.state().unwrap();
        for (i, spec) in specs.iter().enumerate() {
            let [got, want] = [&state, &cpu].map(|state| counted(model, spec, &state.weights[i]));
            let apart = distance(&got, &want);
            assert!(apart < 3e-3, "{} is {apart:.1e} apart", spec.name);
        }
    }
}

/// What a run allocates is what was planned, and all of it before the second step.
#[test]
fn memory_is_what_was_planned() {
    for (name, model) in variants() {
        let recipe = recipe(&model);
        for device in devices() {
            // Other tests may use the same GPU.
            let device = device.counted_apart();
            let before = device.allocated_bytes();
            let planned =
                DeviceMemory::plan(device.info(), &recipe, CLASSES, SLOTS, Place::default()).unwrap();
            assert_eq!(device.allocated_bytes(), before, "a plan allocates nothing");
            let mut engine = device_engine(&device, &recipe, GRAPHS);
            assert_eq!(engine.memory(), planned, "{name}");
            assert_eq!(device.allocated_bytes() - before, planned.total(), "{name}");
            let steps = steps(&model);
            run(&mut engine, &steps[..1]);
            let after = device.allocated_bytes();
            run(&mut engine, &steps[1..3]);
            let mut forward = engine.model().unwrap();
            assert_eq!(forward.logits(&steps[0][0]).unwrap().len(), SLOTS * CLASSES);
            drop(forward);
            assert_eq!(device.allocated_bytes(), after, "{name}: nothing is allocated within a step");
            assert_eq!(after - before, planned.total());
        }
    }
}

/// An evaluation between steps sees the average of the weights and changes no bit of what follows.
#[test]
fn evaluations_are_those_of_the_average() {
    let (_, model) = &variants()[3];
    let (recipe, steps) = (recipe(model), steps(model));
    for device in devices() {
        let mut engine = device_engine(&device, &recipe, GRAPHS);
        let mut other = device_engine(&device, &recipe, GRAPHS);
        let outcomes = run(&mut other, &steps);
        run(&mut engine, &steps[..2]);
        let state = engine.state().unwrap();
        let average = TrainState::fresh(state.ema.as_deref().unwrap().to_vec(), true);
        drop(state);
        let mut cpu = CpuEngine::new(&recipe, step(&recipe), SLOTS, &average, alone()).unwrap();
        for batch in [&steps[0][0], &steps[1][1]] {
            let logits = engine.model().unwrap().logits(batch).unwrap().to_vec();
            let mut forward = cpu.model().unwrap();
            let wanted = forward.logits(batch).unwrap();
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            assert!(distance(&wide(&logits), &wide(wanted)) < 1e-3);
        }
        let rest = run(&mut engine, &steps[2..]);
        assert_eq!(rest.last().unwrap().loss, outcomes.last().unwrap().loss);
        assert!(engine.state().unwrap() == other.state().unwrap());
    }
}

/// Weights that are not finite are told by the step that finds them, and stay as they are.
#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    let (_, model) = &variants()[0];
    let (recipe, steps) = (recipe(model), steps(model));
    for device in devices() {
        let mut engine = device_engine(&device, &recipe, GRAPHS);
        let mut state = begin(&recipe);
        state.weights.to_mut()[0][1] = f32::NAN;
        engine.load(&state).unwrap();
        let outcome = run(&mut engine, &steps[..1])[0];
        assert!(!outcome.loss.is_finite() && !outcome.grad_norm.is_finite());
        let after = engine.state().unwrap();
        assert_eq!((after.optimizer_step, after.weights[1..] == state.weights[1..]), (0, true));
        assert!(after.m == state.m && after.v == state.v);
    }
}
