//! Trainings on devices whose ranks share out the parameters against those of one rank.

use std::rc::Rc;

use trencadis::Result;
use trencadis::autograd::{ParamSpec, Shard};
use trencadis::data::batch::PackedBatch;
use trencadis::device::Device;
use trencadis::nn::init::initialise;
use trencadis::parallel::{Mesh, MeshGroups, Rings, run_ranks};
use trencadis::recipe::*;
use trencadis::train::engine::{
    DeviceEngine, DeviceMemory, DeviceOptions, DeviceRanks, Engine, Fresh, TrainState,
};
use trencadis::train::step::{StepOutcome, TrainStep};

use crate::support::batch;
use crate::support::devices::devices;
use crate::support::numbers::distance;

const CLASSES: usize = 10;
const TOKENS: usize = 128;
const SLOTS: usize = 4;
const RATE: f64 = 1e-2;
const STEPS: usize = 2;
/// Batches of a step.
const BATCHES: usize = 4;

/// A serial block with everything, and ViT-22B's.
fn models() -> [ModelConfig; 2] {
    let serial = ModelConfig {
        shape: String::new(),
        width: 32,
        depth: 3,
        mlp: 48,
        heads: 4,
        kv_heads: 2,
        patch: 2,
        channels: 1,
        layer_scale: 0.5,
        drop_path: 0.3,
        recompute: Recompute::Selective,
        norm_bias: true,
        norm: NormKind::LayerNorm,
        qk_norm: QkNormKind::LayerNorm,
        qk_norm_per_head: false,
        qkv_bias: true,
        proj_bias: true,
        pool_mlp: true,
        position: PositionConfig { rows: 9, columns: 11, ..PositionConfig::default() },
        rope: RopeConfig { kind: Rope::Halves, theta: 20.0, ..RopeConfig::default() },
        ..ModelConfig::default()
    };
    let parallel = ModelConfig {
        block: BlockKind::Parallel,
        norm: NormKind::Rms,
        norm_bias: false,
        qk_norm: QkNormKind::Rms,
        layer_scale: 0.0,
        recompute: Recompute::Full,
        kv_heads: 0,
        rope: RopeConfig::default(),
        ..serial.clone()
    };
    [serial, parallel]
}

fn recipe(model: ModelConfig) -> Recipe {
    let mut recipe = Recipe { model, ..Recipe::default() };
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    recipe.packing.tokens = TOKENS;
    recipe.resolution.max = 20;
    recipe.train =
        TrainConfig { weight_decay: 0.2, clip: 0.5, ema: 0.9, seed: 5, eps: 1e-3, ..TrainConfig::default() };
    recipe
}

fn batches(model: &ModelConfig, step: usize) -> Vec<PackedBatch> {
    const GRIDS: [[u16; 2]; 6] = [[4, 3], [1, 1], [7, 2], [1, 9], [5, 5], [2, 2]];
    let make = |i: usize| {
        let grids: Vec<[u16; 2]> = (0..1 + (i + step) % 3).map(|j| GRIDS[(step + i + 2 * j) % 6]).collect();
        let mut batch =
            batch(&grids, model.prefix(), model.patch_dim(), CLASSES, TOKENS, SLOTS - grids.len());
        batch.sample_ids.iter_mut().for_each(|id| *id += (100 * step + 10 * i) as u64);
        batch
    };
    (0..BATCHES).map(make).collect()
}

struct Trained {
    outcomes: Vec<StepOutcome>,
    state: TrainState<'static>,
    logits: Vec<f32>,
}

/// Weights whose slices have other norms than the whole.
fn begin(params: &[ParamSpec]) -> Vec<Vec<f32>> {
    let mut weights = initialise(params, 3);
    for (weights, spec) in weights.iter_mut().zip(params).filter(|(_, spec)| spec.decay) {
        let ramp = |i: usize| 0.2 + 1.6 * i as f32 / spec.len() as f32;
        weights.iter_mut().enumerate().for_each(|(i, weight)| *weight *= ramp(i));
    }
    weights
}

/// This rank's part of a training.
fn train(device: &Device, recipe: &Recipe, overlap: Option<Rings>, ranks: Rc<MeshGroups>) -> Result<Trained> {
    let [data, tensor] =
        [&ranks.data, &ranks.tensor].map(|group| Shard { rank: group.rank(), size: group.size() });
    let step = TrainStep::of_shard(recipe, CLASSES, SLOTS, tensor)?;
    let state = Fresh::given(step.params(), begin(step.params()), true);
    let options = DeviceOptions::default();
    let connected = match ranks.world.size() {
        1 => None,
        // On the emulator threads can overlap on one device; on a GPU they would wait for one another.
        _ => {
            let ranks = DeviceRanks::connect(ranks.clone(), device)?;
            Some(DeviceRanks { overlap, ..ranks })
        }
    };
    let mut engine = DeviceEngine::on_mesh(device, recipe, step, SLOTS, options, (data, connected))?;
    let planned = DeviceMemory::plan(device.info(), recipe, CLASSES, SLOTS, ranks.place())?;
    // Flags of a ring are not planned.
    let flags = if overlap.is_some() && tensor.is_part() { 1024 } else { 0 };
    let more = engine.memory().total() - planned.total();
    assert!(more <= flags, "a rank takes what is planned for its place, and {more} bytes more");
    engine.load(&state)?;
    let mut outcomes = Vec::new();
    for number in 0..STEPS {
        let own: Vec<PackedBatch> =
            batches(&recipe.model, number).into_iter().skip(data.rank).step_by(data.size).collect();
        engine.queue(&own, RATE)?;
    }
    for _ in 0..STEPS {
        outcomes.push(engine.collect()?);
    }
    let state = engine.state()?;
    let logits = engine.model()?.logits(&batches(&recipe.model, 7)[0])?.to_vec();
    Ok(Trained { outcomes, state, logits })
}

fn on_mesh(device: &Device, recipe: &Recipe, [data, tensor]: [usize; 2], overlap: Option<Rings>) -> Trained {
    let (device, recipe, mesh) =
        (device.clone(), recipe.clone(), Mesh::of(data * tensor, data, tensor).unwrap());
    let ranks = run_ranks(mesh.world(), move |group| {
        train(&device, &recipe, overlap, Rc::new(MeshGroups::new(group, mesh)?))
    });
    let ranks = ranks.unwrap();
    for other in &ranks[1..] {
        let told = |trained: &Trained| -> Vec<_> {
            trained.outcomes.iter().map(|o| (o.loss, o.grad_norm, o.images)).collect()
        };
        assert_eq!(told(other), told(&ranks[0]));
        assert_eq!(other.logits, ranks[0].logits);
    }
    ranks.into_iter().next().unwrap()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

#[track_caller]
fn alike(what: &str, got: &Trained, want: &Trained, params: &[ParamSpec], tolerance: f64) {
    for (got, want) in got.outcomes.iter().zip(&want.outcomes) {
        let close = |a: f64, b: f64| (a - b).abs() <= 2e-3 * b.abs();
        assert!(close(got.loss, want.loss), "{what}: loss {} and {}", got.loss, want.loss);
        assert!(close(got.grad_norm, want.grad_norm), "{what}: {} and {}", got.grad_norm, want.grad_norm);
        assert_eq!((got.images, got.tokens, got.budget), (want.images, want.tokens, want.budget), "{what}");
    }
    let start = begin(params);
    let worst = params.iter().enumerate().map(|(i, spec)| {
        let ema = |state: &TrainState<'static>| state.ema.as_ref().unwrap()[i].clone();
        // How far weights have come tells more than where they are.
        let moved = |state: &TrainState<'static>| -> Vec<f32> {
            state.weights[i].iter().zip(&start[i]).map(|(weight, start)| weight - start).collect()
        };
        let of = |state: &TrainState<'static>| [state.m[i].clone(), moved(state), ema(state)];
        let both = of(&got.state).into_iter().zip(of(&want.state));
        (both.map(|(a, b)| distance(&wide(&a), &wide(&b))).fold(0.0, f64::max), &spec.name)
    });
    let (worst, name) = worst.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
    assert!(worst <= tolerance, "{what}: {name} is {worst:.1e} apart");
    assert!(distance(&wide(&got.logits), &wide(&want.logits)) <= 1e-3, "{what}: logits");
}

#[test]
fn meshes_change_nothing_on_a_device() {
    let [serial, parallel] = models();
    for (i, device) in devices().into_iter().enumerate() {
        use OptimizerKind::{Adafactor, AdamW, Lamb, Sgd};
        // Mesh, and the rings in which chunks move while products run.
        type Meshes<'a> = &'a [([usize; 2], Option<Rings>)];
        let (one, two) = (Some(Rings::One), Some(Rings::Two));
        let cases: &[(&ModelConfig, OptimizerKind, Meshes)] = match i {
            0 => &[(&serial, AdamW, &[([4, 1], None), ([1, 2], one)]), (&parallel, Lamb, &[([2, 2], one)])],
            1 => &[
                (&parallel, AdamW, &[([1, 4], None), ([1, 4], two)]),
                // Where second moments are of single elements, rounding to bf16 on a tensor axis turns signs.
                (&parallel, Adafactor, &[([2, 1], None)]),
                (&serial, Sgd, &[([2, 1], None)]),
            ],
            _ => &[
                (&serial, AdamW, &[([4, 1], None), ([2, 2], None)]),
                (&parallel, AdamW, &[([1, 4], None)]),
                (&parallel, Lamb, &[([4, 1], None), ([2, 2], None)]),
                (&parallel, Adafactor, &[([4, 1], None)]),
            ],
        };
        for &(model, optimizer, meshes) in cases {
            let mut recipe = recipe(model.clone());
            recipe.train.optimizer = optimizer;
            let params = TrainStep::new(&recipe, CLASSES, SLOTS).unwrap().params().to_vec();
            let want = train(&device, &recipe, None, Rc::new(MeshGroups::alone())).unwrap();
            for &(mesh, overlap) in meshes {
                let what = format!("{:?} blocks, {optimizer:?}, {mesh:?}, overlap {overlap:?}", model.block);
                // What the tensor axis sums is rounded to bf16 on every rank.
                let tolerance = if mesh[1] > 1 { 1e-3 } else { 1e-5 };
                alike(&what, &on_mesh(&device, &recipe, mesh, overlap), &want, &params, tolerance);
            }
        }
    }
}
