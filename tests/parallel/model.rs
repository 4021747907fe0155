//! Trainings of whole models on meshes against those of one rank.

use std::rc::Rc;
use std::sync::Arc;

use trencadis::autograd::graph::Init;
use trencadis::autograd::{ParamSpec, Plan, Shard, sharded};
use trencadis::data::batch::PackedBatch;
use trencadis::nn::init::initialise;
use trencadis::parallel::collectives::part_of;
use trencadis::parallel::zero::{Schedule, Units};
use trencadis::parallel::{Group, Mesh, MeshGroups, run_ranks};
use trencadis::recipe::*;
use trencadis::train::engine::{CpuEngine, Engine, Fresh, StateSource, TrainState};
use trencadis::train::step::{StepOutcome, TrainStep};
use trencadis::{Error, Result};

use crate::support::batch;

const CLASSES: usize = 10;
const TOKENS: usize = 48;
const SLOTS: usize = 6;
const RATE: f64 = 1e-2;
const STEPS: usize = 3;

/// Blocks of every kind: serial with everything that a block may have, with gains for each head and recomputed
/// activations, ViT-22B's, parallel ones with biases and with LayerScale, and serial ones with shared keys and values
/// and rotary positions.
fn models() -> [(&'static str, ModelConfig); 6] {
    let serial = ModelConfig {
        shape: String::new(),
        width: 48,
        depth: 3,
        mlp: 48,
        heads: 24,
        head_dim: 4,
        patch: 2,
        channels: 1,
        position: PositionConfig { rows: 9, columns: 11, ..PositionConfig::default() },
        norm: NormKind::LayerNorm,
        norm_bias: true,
        qk_norm: QkNormKind::LayerNorm,
        qk_norm_per_head: false,
        qkv_bias: true,
        proj_bias: true,
        layer_scale: 0.5,
        drop_path: 0.4,
        ..ModelConfig::default()
    };
    let per_head = ModelConfig {
        qk_norm: QkNormKind::Rms,
        qk_norm_per_head: true,
        qkv_bias: false,
        recompute: Recompute::Full,
        pool: PoolKind::Cls,
        class_token: true,
        ..serial.clone()
    };
    let grouped = ModelConfig {
        heads: 48,
        kv_heads: 24,
        qk_norm: QkNormKind::LayerNormBias,
        rope: RopeConfig { kind: Rope::Halves, theta: 20.0, ..RopeConfig::default() },
        recompute: Recompute::Selective,
        ..per_head.clone()
    };
    let vit_22b = ModelConfig {
        block: BlockKind::Parallel,
        norm: NormKind::Rms,
        norm_bias: false,
        qk_norm: QkNormKind::Rms,
        qkv_bias: false,
        proj_bias: false,
        layer_scale: 0.0,
        recompute: Recompute::Selective,
        pool_mlp: true,
        ..serial.clone()
    };
    let biases = ModelConfig { qkv_bias: true, proj_bias: true, ..vit_22b.clone() };
    let scaled = ModelConfig { layer_scale: 0.5, recompute: Recompute::Full, ..biases.clone() };
    [
        ("serial", serial),
        ("serial, a gain for each head", per_head),
        ("parallel", vit_22b),
        ("parallel with biases", biases),
        ("parallel with LayerScale", scaled),
        ("serial with shared keys and rotary positions", grouped),
    ]
}

fn recipe(model: &ModelConfig) -> Recipe {
    let mut recipe = Recipe { model: model.clone(), ..Recipe::default() };
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    recipe.packing.tokens = TOKENS;
    // So large an ε keeps gradients that are nothing but rounding from becoming steps.
    recipe.train =
        TrainConfig { weight_decay: 0.2, clip: 0.5, ema: 0.9, seed: 5, eps: 1e-3, ..TrainConfig::default() };
    recipe
}

/// Batches of a step, with other numbers of images and of live tokens each.
fn batches(model: &ModelConfig, step: usize, count: usize) -> Vec<PackedBatch> {
    const GRIDS: [[u16; 2]; 6] = [[4, 3], [1, 1], [7, 2], [1, 9], [5, 3], [2, 2]];
    let make = |i: usize| {
        let grids: Vec<[u16; 2]> = (0..1 + (i + step) % 3).map(|j| GRIDS[(step + i + 2 * j) % 6]).collect();
        let spare = SLOTS - grids.len();
        let mut batch = batch(&grids, model.prefix(), model.patch_dim(), CLASSES, TOKENS, spare);
        batch.sample_ids.iter_mut().for_each(|id| *id += (100 * step + 10 * i) as u64);
        batch
    };
    (0..count).map(make).collect()
}

/// Weights with something of everything.
fn begin(step: &TrainStep) -> TrainState<'static> {
    let noise = |param: &ParamSpec| ParamSpec { init: Init::Normal(0.1), ..param.clone() };
    let noise: Vec<ParamSpec> = step.params().iter().map(noise).collect();
    let mut weights = initialise(step.params(), 3);
    for (weight, noise) in weights.iter_mut().flatten().zip(initialise(&noise, 4).into_iter().flatten()) {
        *weight += noise;
    }
    TrainState::fresh(weights, true)
}

/// What a training did: outcomes, the state after it, logits of an evaluation.
#[derive(Clone)]
struct Trained {
    outcomes: Vec<StepOutcome>,
    state: TrainState<'static>,
    logits: Vec<f32>,
}

/// This rank's part of a training whose steps have `count` batches, dealt to the data axis in turn.
fn train(recipe: &Recipe, count: usize, ranks: MeshGroups, from: Option<Trained>) -> Result<Trained> {
    let ranks = Rc::new(ranks);
    let shard = Shard { rank: ranks.tensor.rank(), size: ranks.tensor.size() };
    let step = TrainStep::of_shard(recipe, CLASSES, SLOTS, shard)?;
    let first = from.as_ref().map_or(0, |from| from.state.optimizer_step as usize);
    let fresh = Fresh::given(step.params(), begin(&step).weights.into_owned(), true);
    let state: &dyn StateSource = from.as_ref().map_or(&fresh, |from| &from.state);
    let mut engine = CpuEngine::new(recipe, step, SLOTS, state, ranks.clone())?;
    let mut outcomes = Vec::new();
    let (rank, size) = (ranks.data.rank(), ranks.data.size());
    for number in first..first + STEPS {
        let all = batches(&recipe.model, number, count);
        let own: Vec<PackedBatch> = all.into_iter().skip(rank).step_by(size).collect();
        engine.queue(&own, RATE)?;
        outcomes.push(engine.collect()?);
    }
    let state = engine.state()?;
    let logits = engine.model()?.logits(&batches(&recipe.model, 7, 1)[0])?.to_vec();
    Ok(Trained { outcomes, state, logits })
}

/// The same on all ranks of a mesh; what rank 0 has of it, once all agree.
fn on_mesh(model: &ModelConfig, count: usize, mesh: [usize; 2], from: Option<Trained>) -> Trained {
    recipe_on_mesh(recipe(model), count, mesh, from)
}

fn recipe_on_mesh(
    recipe: Recipe,
    count: usize,
    [data, tensor]: [usize; 2],
    from: Option<Trained>,
) -> Trained {
    let mesh = Mesh::of(data * tensor, data, tensor).unwrap();
    let from = Arc::new(from);
    let ranks = run_ranks(mesh.world(), move |group| {
        train(&recipe, count, MeshGroups::new(group, mesh)?, (*from).clone())
    });
    let ranks = ranks.unwrap();
    for other in &ranks[1..] {
        assert_eq!(other.outcomes, ranks[0].outcomes, "all ranks tell the same of a step");
        assert_eq!(other.logits, ranks[0].logits, "all ranks have the same logits");
    }
    ranks.into_iter().next().unwrap()
}

/// ‖a − b‖ / ‖b‖.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let error: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (error / b.iter().map(|b| square(f64::from(*b))).sum::<f64>().max(1e-30)).sqrt()
}

#[track_caller]
fn alike(what: &str, got: &Trained, want: &Trained, params: &[ParamSpec]) {
    for (got, want) in got.outcomes.iter().zip(&want.outcomes) {
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs();
        assert!(close(got.loss, want.loss), "{what}: loss {} and {}", got.loss, want.loss);
        assert!(close(got.grad_norm, want.grad_norm), "{what}: {} and {}", got.grad_norm, want.grad_norm);
        assert_eq!((got.images, got.tokens, got.budget), (want.images, want.tokens, want.budget), "{what}");
        assert!(close(got.flops, want.flops) && close(got.accuracy, want.accuracy), "{what}");
    }
    assert_eq!(got.state.optimizer_step, want.state.optimizer_step);
    let bf16 = &want.state.statistics;
    for (i, spec) in params.iter().enumerate() {
        let ema = |state: &TrainState<'_>| state.ema.as_ref().unwrap()[i].clone();
        let of = |state: &TrainState<'static>| {
            let [v, statistics] =
                [&state.v, &state.statistics].map(|x| x.get(i).cloned().unwrap_or_default());
            [state.weights[i].clone(), ema(state), v, statistics, state.m[i].clone()]
        };
        for (kind, (got, want)) in ["weights", "average", "v", "statistics", "m"]
            .iter()
            .zip(of(&got.state).iter().zip(&of(&want.state)))
        {
            let apart = apart(got, want);
            // What is nothing but rounding has no relative error.
            let noise = want.iter().fold(0.0f32, |max, x| max.max(x.abs())) < 1e-8;
            // Of momentum in bf16 a few numbers are rounded to the other side.
            let tolerance = if *kind == "m" && !bf16.is_empty() { 1e-3 } else { 1e-5 };
            assert!(apart <= tolerance || noise, "{what}: {kind} of {}: {apart:.1e} apart", spec.name);
        }
    }
    assert!(apart(&got.logits, &want.logits) <= 1e-5, "{what}: logits");
}

fn params(model: &ModelConfig) -> Vec<ParamSpec> {
    TrainStep::new(&recipe(model), CLASSES, SLOTS).unwrap().params().to_vec()
}

#[test]
fn a_tensor_axis_changes_nothing() {
    for (name, model) in models() {
        let want = on_mesh(&model, 2, [1, 1], None);
        for size in [2, 3, 4, 8] {
            let got = on_mesh(&model, 2, [1, size], None);
            alike(&format!("{name}, {size} ranks"), &got, &want, &params(&model));
        }
    }
}

#[test]
fn a_data_axis_changes_nothing() {
    for (name, model) in models().into_iter().take(3) {
        let want = on_mesh(&model, 24, [1, 1], None);
        for size in [2, 3, 4, 8] {
            let got = on_mesh(&model, 24, [size, 1], None);
            alike(&format!("{name}, {size} ranks"), &got, &want, &params(&model));
        }
    }
}

/// Both axes; and a training that goes on under another mesh each time.
#[test]
fn meshes_change_nothing() {
    let (_, model) = models().into_iter().next().unwrap();
    let params = params(&model);
    let mut start: Option<Trained> = None;
    for mesh in [[2, 2], [1, 1], [3, 2], [2, 4], [6, 1]] {
        let want = on_mesh(&model, 6, [1, 1], start.clone());
        let got = on_mesh(&model, 6, mesh, start);
        alike(&format!("{mesh:?}"), &got, &want, &params);
        start = Some(got);
    }
}

/// LAMB takes the norms of whole parameters, Adafactor their rows and columns, of which every rank has slices; going on
/// elsewhere too.
#[test]
fn other_optimisers_on_meshes_change_nothing() {
    use OptimizerKind::{Adafactor, Lamb, Sgd};
    let all = models();
    let [serial, per_head, parallel] = [0, 1, 2].map(|i| &all[i]);
    for (optimizer, (name, model)) in
        [(Lamb, serial), (Lamb, per_head), (Lamb, parallel), (Sgd, serial), (Adafactor, parallel)]
    {
        let mut recipe = recipe(model);
        let adamw = recipe_on_mesh(recipe.clone(), 6, [1, 1], None);
        recipe.train.optimizer = optimizer;
        recipe.train.nesterov = optimizer == Sgd;
        let name = format!("{optimizer:?}, {name}");
        let want = recipe_on_mesh(recipe.clone(), 6, [1, 1], None);
        let head = want.state.weights.len() - 2;
        assert!(apart(&want.state.weights[head], &adamw.state.weights[head]) > 1e-3, "another optimiser");
        let params = params(model);
        for mesh in [[2, 1], [3, 1], [1, 2], [2, 2]] {
            let got = recipe_on_mesh(recipe.clone(), 6, mesh, None);
            alike(&format!("{name}, {mesh:?}"), &got, &want, &params);
        }
        let further = recipe_on_mesh(recipe.clone(), 6, [1, 1], Some(want.clone()));
        let elsewhere = recipe_on_mesh(recipe, 6, [3, 2], Some(want));
        alike(&format!("{name}, further"), &elsewhere, &further, &params);
    }
}

/// Of one step over one batch a rank, on both axes.
fn sent(group: &Group, recipe: &Recipe, mesh: Mesh) -> Result<()> {
    let ranks = Rc::new(MeshGroups::new(group, mesh)?);
    let shard = Shard { rank: ranks.tensor.rank(), size: ranks.tensor.size() };
    let step = TrainStep::of_shard(recipe, CLASSES, SLOTS, shard)?;
    let state = begin(&step);
    let data = Shard { rank: ranks.data.rank(), size: ranks.data.size() };
    let units = Units::new(step.graph(), data);
    let schedule = Schedule::new(step.graph(), step.plan(), &units);
    let weights_and_gradients = schedule.volume(&units);
    let activations = sharded::volume(step.graph(), &Plan::new(step.graph()).order, shard.rank);
    let splits: Vec<bool> = (0..step.params().len())
        .map(|p| step.graph().split(p) == trencadis::autograd::Split::Summed)
        .collect();
    let mut engine = CpuEngine::new(recipe, step, SLOTS, &state, ranks.clone())?;
    engine.gradients(&batches(&recipe.model, 0, 1))?;
    assert_eq!(engine.data_axis_sent(), 4 * weights_and_gradients);
    let summed: usize = units.slices().iter().filter(|s| splits[s.param]).map(|s| s.range.len()).sum();
    let part = part_of(summed, shard.size, shard.rank).len();
    let sums = if shard.size > 1 { summed - part + (shard.size - 1) * part } else { 0 };
    assert_eq!(ranks.tensor.sent().iter().sum::<u64>(), 4 * (activations + sums as u64));
    Ok(())
}

#[test]
fn traffic_is_that_of_the_formulas() {
    for (_, model) in models() {
        for [data, tensor] in [[1, 2], [2, 1], [3, 4], [4, 3], [1, 8]] {
            let recipe = recipe(&model);
            let mesh = Mesh::of(data * tensor, data, tensor).unwrap();
            run_ranks(mesh.world(), move |group| sent(group, &recipe, mesh)).unwrap();
        }
    }
}

/// A block sends what the table of `nn::block` says, and its forward pass twice where it is computed again.
#[test]
fn gathers_and_reductions_of_a_block() {
    for ((name, model), parts) in models().into_iter().zip([10, 14, 5, 5, 10, 10]) {
        let of = |depth: usize| {
            let model = ModelConfig { depth, ..model.clone() };
            let shard = Shard { rank: 1, size: 4 };
            let step = TrainStep::of_shard(&recipe(&model), CLASSES, SLOTS, shard).unwrap();
            sharded::volume(step.graph(), &Plan::new(step.graph()).order, shard.rank)
        };
        let part = (3 * TOKENS / 4 * model.width) as u64;
        assert_eq!(of(3) - of(2), parts * part, "{name}");
    }
}

#[test]
fn what_cannot_be_shared_out_is_refused() {
    let (_, mut model) = models().into_iter().next().unwrap();
    let whole = recipe(&model);
    let refused = |tensor: usize| -> Error {
        let shard = Shard { rank: 0, size: tensor };
        TrainStep::of_shard(&whole, CLASSES, SLOTS, shard).err().unwrap()
    };
    assert_eq!(
        refused(5).to_string(),
        "model.heads 24, model.mlp 48, packing.tokens 48 cannot be shared evenly by 5 ranks; choose a tensor axis \
         that divides them"
    );
    assert!(refused(16).to_string().starts_with("model.heads 24 cannot be shared evenly by 16 ranks"));
    model.kv_heads = 4;
    let grouped = TrainStep::of_shard(&recipe(&model), CLASSES, SLOTS, Shard { rank: 0, size: 8 });
    let error = grouped.err().unwrap().to_string();
    assert!(error.starts_with("model.kv_heads 4 cannot be shared evenly by 8 ranks"), "{error}");
}
