//! A whole recorded step, forward, loss and backward, on every device that has kernels, against the CPU device
//! in f64.

mod support;

use std::collections::HashMap;

use half::bf16;
use support::batch;
use support::devices::devices;
use support::numbers::{distance, random};
use trencadis::autograd::device::{ArenaPlan, BatchShape, fused};
use trencadis::autograd::graph::{Graph, Init, Tensor};
use trencadis::autograd::loss;
use trencadis::autograd::{CpuExecutor, DeviceExecutor, Plan, StepState};
use trencadis::data::batch::{PackedBatch, Targets};
use trencadis::device::Device;
use trencadis::models::vit;
use trencadis::recipe::*;

const GRIDS: [[u16; 2]; 5] = [[4, 3], [1, 1], [7, 2], [1, 9], [5, 5]];
/// Not a multiple of 8, so that the head's rows are padded.
const CLASSES: usize = 10;
const TOKENS: usize = 128;
const STEP: StepState = StepState { seed: 11, loss_scale: 0.2 };

/// Small models in which every op of the graph and every kind of block, norm, pool and position stands somewhere.
fn variants() -> Vec<(&'static str, ModelConfig)> {
    let base = ModelConfig {
        shape: String::new(),
        width: 32,
        depth: 2,
        mlp: 48,
        heads: 2,
        patch: 2,
        channels: 1,
        position: PositionConfig { rows: 9, columns: 11, ..PositionConfig::default() },
        ..ModelConfig::default()
    };
    let with = |change: &dyn Fn(&mut ModelConfig)| {
        let mut config = base.clone();
        change(&mut config);
        config
    };
    vec![
        ("navit", base.clone()),
        (
            "vit",
            with(&|c| {
                (c.pool, c.class_token, c.registers) = (PoolKind::Cls, true, 1);
                c.qk_norm = QkNormKind::None;
                (c.norm_bias, c.qkv_bias, c.proj_bias) = (true, true, true);
                c.layer_scale = 0.3;
                c.position.coordinate = PositionCoordinate::Fractional;
                c.position.combination = PositionCombination::Joint;
                c.position.resample = PositionResample::Bicubic;
                c.checkpoint = true;
            }),
        ),
        (
            "parallel",
            with(&|c| {
                (c.block, c.norm, c.pool) = (BlockKind::Parallel, NormKind::Rms, PoolKind::Mean);
                (c.qk_norm, c.qk_norm_per_head) = (QkNormKind::LayerNormBias, false);
                (c.registers, c.head_norm, c.patch_norm_out) = (3, true, true);
                (c.drop_path, c.layer_scale) = (0.4, 0.5);
                c.position.basis = PositionBasis::Fourier;
                c.position.coordinate = PositionCoordinate::FractionalAspect;
            }),
        ),
        (
            "pooling with an mlp",
            with(&|c| {
                (c.pool_mlp, c.pool_residual, c.pool_query_norm) = (true, true, true);
                (c.gelu, c.drop_path) = (GeluKind::Tanh, 0.3);
                c.position.basis = PositionBasis::Sinusoidal;
                c.position.combination = PositionCombination::Stack;
            }),
        ),
    ]
}

struct Recorded {
    graph: Graph,
    logits: Tensor,
    per_image: Tensor,
    /// Values that bf16 holds exactly.
    params: Vec<Vec<f32>>,
}

fn record(config: &ModelConfig, batch: &PackedBatch, kind: LossKind) -> Recorded {
    let mut recipe = Recipe { model: config.clone(), ..Recipe::default() };
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    let mut graph = Graph::new();
    let outputs = vit::record(&mut graph, &recipe, CLASSES, batch.tokens(), batch.slots(), true).unwrap();
    let loss = loss::classification(&mut graph, outputs.logits, kind, 0.1);
    graph.backward(&[(outputs.logits, loss.dlogits)]);
    graph.keep(loss.per_image);
    graph.keep(outputs.logits);
    let params = graph
        .params()
        .iter()
        .enumerate()
        .map(|(i, param)| {
            let (mean, spread) = match param.init {
                Init::Constant(value) => (f64::from(value), 0.2),
                _ => (0.0, 1.0 / (*param.shape.last().unwrap() as f64).sqrt()),
            };
            let values = random::<f64>(param.len(), i as u64);
            values.iter().map(|x| bf16::from_f64(mean + spread * x).to_f32()).collect()
        })
        .collect();
    Recorded { graph, logits: outputs.logits, per_image: loss.per_image, params }
}

/// Loss of each image, logits and gradients.
type Outcome = (Vec<f64>, Vec<f64>, Vec<Vec<f64>>);

fn on_cpu(recorded: &Recorded, batch: &PackedBatch) -> Outcome {
    let wide = |x: &Vec<f32>| x.iter().map(|&x| f64::from(x)).collect();
    let params: Vec<Vec<f64>> = recorded.params.iter().map(wide).collect();
    let mut grads: Vec<Vec<f64>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
    let mut executor = CpuExecutor::<f64>::new();
    let plan = Plan::new(&recorded.graph);
    executor.run(&recorded.graph, &plan, &params, &mut grads, &HashMap::new(), batch, &STEP);
    (executor.value(recorded.per_image).to_vec(), executor.value(recorded.logits).to_vec(), grads)
}

fn executor(device: &Device, recorded: &Recorded, batch: &PackedBatch) -> DeviceExecutor {
    let mut executor = DeviceExecutor::new(device, &recorded.graph, BatchShape::of(batch), &|_| 0.0).unwrap();
    executor.write_params(&recorded.params).unwrap();
    assert_eq!(executor.read_params().unwrap(), recorded.params);
    executor
}

fn on_device(executor: &mut DeviceExecutor, recorded: &Recorded, batch: &PackedBatch) -> Outcome {
    executor.write_batch(batch, &STEP).unwrap();
    executor.zero_grads().unwrap();
    executor.launch().unwrap();
    let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect();
    (
        wide(executor.value(recorded.per_image).unwrap()),
        wide(executor.value(recorded.logits).unwrap()),
        executor.read_grads().unwrap().into_iter().map(wide).collect(),
    )
}

#[test]
fn a_step_agrees_with_the_cpu() {
    for (name, config) in variants() {
        let mut batch = batch(&GRIDS, config.prefix(), config.patch_dim(), CLASSES, TOKENS, 2);
        batch.weights[1] = 0.5;
        let mut kind = LossKind::Softmax;
        if name == "parallel" {
            kind = LossKind::Sigmoid;
            let soft = random::<f32>(batch.slots() * CLASSES, 3).iter().map(|x| x.abs().min(1.0)).collect();
            batch.targets = Targets::Soft(soft);
        }
        let recorded = record(&config, &batch, kind);
        let (loss, logits, grads) = on_cpu(&recorded, &batch);
        for device in devices() {
            let start = std::time::Instant::now();
            let mut executor = executor(&device, &recorded, &batch);
            let got = on_device(&mut executor, &recorded, &batch);
            let mut worst = (distance(&got.0, &loss), "loss".to_string());
            let mut compare = |what: &str, got: &[f64], want: &[f64]| {
                let apart = distance(got, want);
                if apart > worst.0 {
                    worst = (apart, what.into());
                }
                assert!(apart <= 1e-3, "{name} on {}: {what} is {apart:.1e} apart", device.info().name);
            };
            compare("logits", &got.1, &logits);
            let rank = executor.rank().download().unwrap();
            assert!(rank[..GRIDS.len()].iter().all(|rank| (0..CLASSES as i32).contains(rank)), "{rank:?}");
            assert!(rank[GRIDS.len()..].iter().all(|&rank| rank == -1), "{rank:?}");
            for ((param, got), want) in recorded.graph.params().iter().zip(&got.2).zip(&grads) {
                // A bias on k cancels in the softmax: what comes out is rounding.
                if !param.name.ends_with("k_norm.bias") {
                    compare(&format!("the gradient of {}", param.name), got, want);
                }
            }
            executor.check().unwrap();
            let again = on_device(&mut executor, &recorded, &batch);
            assert_eq!(got, again, "{name} on {}: another run, other bits", device.info().name);
            println!(
                "{name} on {}: at most {:.1e} apart ({}), arena {} bytes for {} in use, {:.1} s",
                device.info().name,
                worst.0,
                worst.1,
                executor.layout().bytes,
                executor.layout().peak,
                start.elapsed().as_secs_f64()
            );
        }
    }
}

/// One image that fills the budget, and no image at all.
#[test]
fn full_and_empty_batches() {
    let (name, config) = &variants()[1];
    let full = batch(&[[9, 14]], 2, config.patch_dim(), CLASSES, TOKENS, 0);
    let recorded = record(config, &full, LossKind::Softmax);
    let (loss, logits, grads) = on_cpu(&recorded, &full);
    let mut empty = full.clone();
    (empty.images, empty.cu_seqlens[1], empty.weights[0]) = (0, 0, 0.0);
    for device in devices() {
        let mut executor = executor(&device, &recorded, &full);
        let got = on_device(&mut executor, &recorded, &full);
        assert!(distance(&got.0, &loss) < 1e-3 && distance(&got.1, &logits) < 1e-3, "{name}");
        for ((param, got), want) in recorded.graph.params().iter().zip(&got.2).zip(&grads) {
            let apart = distance(got, want);
            assert!(apart < 1e-3, "{name}: the gradient of {} is {apart:.1e} apart", param.name);
        }
        let nothing = on_device(&mut executor, &recorded, &empty);
        assert!(nothing.0.iter().chain(nothing.2.iter().flatten()).all(|x| *x == 0.0), "{name}");
    }
}

/// What a batch puts beside an image changes no bit of its logits and of its loss, wherever it lies.
#[test]
fn neighbours_change_nothing() {
    let config = &variants()[0].1;
    let alone = batch(&GRIDS[2..3], 0, config.patch_dim(), CLASSES, TOKENS, 4);
    let mut among = batch(&GRIDS, 0, config.patch_dim(), CLASSES, TOKENS, 0);
    among.sample_ids[2] = alone.sample_ids[0];
    let (Targets::Classes(to), Targets::Classes(from)) = (&mut among.targets, &alone.targets) else {
        unreachable!("both have classes")
    };
    to[2] = from[0];
    let recorded = record(config, &among, LossKind::Softmax);
    let shape = BatchShape { longest: 9, ..BatchShape::of(&among) };
    for device in devices() {
        let mut executor = DeviceExecutor::new(&device, &recorded.graph, shape, &|_| 0.0).unwrap();
        executor.write_params(&recorded.params).unwrap();
        let here = on_device(&mut executor, &recorded, &alone);
        let there = on_device(&mut executor, &recorded, &among);
        assert_eq!(here.0[0], there.0[2]);
        assert_eq!(here.1[..CLASSES], there.1[2 * CLASSES..3 * CLASSES]);
    }
}

/// Gradients of several batches add up, and a captured graph repeats the step over whatever batch was written.
#[test]
fn batches_accumulate_and_replay() {
    let config = &variants()[0].1;
    let one = batch(&GRIDS[..3], 0, config.patch_dim(), CLASSES, TOKENS, 3);
    let two = batch(&GRIDS[2..], 0, config.patch_dim(), CLASSES, TOKENS, 3);
    let recorded = record(config, &one, LossKind::Softmax);
    let shape = BatchShape { longest: 9, ..BatchShape::of(&one) };
    for device in devices() {
        let mut executor = DeviceExecutor::new(&device, &recorded.graph, shape, &|_| 0.0).unwrap();
        executor.write_params(&recorded.params).unwrap();
        let plain = on_device(&mut executor, &recorded, &one);
        executor.write_batch(&two, &STEP).unwrap();
        executor.launch().unwrap();
        let both = executor.read_grads().unwrap();
        let second = on_device(&mut executor, &recorded, &two);
        for (both, (one, two)) in both.iter().zip(plain.2.iter().zip(&second.2)) {
            let sum: Vec<f64> = one.iter().zip(two).map(|(one, two)| one + two).collect();
            let both: Vec<f64> = both.iter().map(|&x| f64::from(x)).collect();
            assert!(distance(&both, &sum) < 1e-9);
        }

        let stream = executor.stream();
        stream.begin_capture().unwrap();
        executor.launch().unwrap();
        let graph = stream.end_capture().unwrap();
        executor.write_batch(&one, &STEP).unwrap();
        executor.zero_grads().unwrap();
        graph.launch(executor.stream()).unwrap();
        assert_eq!(executor.value(recorded.logits).unwrap(), narrow(&plain.1));
        let replayed = executor.read_grads().unwrap();
        assert!(replayed.iter().zip(&plain.2).all(|(replayed, plain)| *replayed == narrow(plain)));
    }
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// What no kernel takes is said when the memory is laid out, not in the middle of a step.
#[test]
fn what_has_no_kernel_is_said_before_the_first_step() {
    let Some(device) = devices().into_iter().next() else { return };
    let base = variants()[0].1.clone();
    let says = |config: &ModelConfig| {
        let batch = batch(&GRIDS, config.prefix(), config.patch_dim(), CLASSES, TOKENS, 2);
        let recorded = record(config, &batch, LossKind::Softmax);
        let made = DeviceExecutor::new(&device, &recorded.graph, BatchShape::of(&batch), &|_| 0.0);
        made.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let said = says(&ModelConfig { head_dim: 12, ..base.clone() });
    assert!(said.contains("head dim of 12, expected a multiple of 8"), "{said}");
    let said = says(&ModelConfig { width: 36, ..base.clone() });
    assert!(said.contains("rows have 36 columns, expected a multiple of 8"), "{said}");
    let said = says(&ModelConfig { patch_norm_in: true, ..base });
    assert!(said.contains("rows of 4 elements"), "{said}");

    let config = &variants()[0].1;
    let small = batch(&GRIDS[..1], 0, config.patch_dim(), CLASSES, TOKENS, 4);
    let large = batch(&GRIDS, 0, config.patch_dim(), CLASSES, TOKENS, 0);
    let recorded = record(config, &small, LossKind::Softmax);
    let mut executor = executor(&device, &recorded, &small);
    let said = executor.write_batch(&large, &STEP).unwrap_err().to_string();
    assert!(said.contains("longest: 9") && said.contains("longest: 4"), "{said}");
    let said = executor.write_params(&recorded.params[1..]).unwrap_err().to_string();
    assert!(said.contains("give those of this recipe"), "{said}");
    let other = recorded.graph.nodes()[0].outputs[0].unwrap();
    assert!(executor.value(other).unwrap_err().to_string().contains("was not kept"));
}

/// Nodes that are one launch on a device compute the same on the CPU as apart.
#[test]
fn fused_nodes_compute_the_same() {
    for (name, config) in variants() {
        let batch = batch(&GRIDS, config.prefix(), config.patch_dim(), CLASSES, TOKENS, 2);
        let mut recorded = record(&config, &batch, LossKind::Softmax);
        let apart = on_cpu(&recorded, &batch);
        let fused = fused(&recorded.graph);
        assert!(fused.nodes().len() < recorded.graph.nodes().len(), "{name}");
        recorded.graph = fused;
        let together = on_cpu(&recorded, &batch);
        for (together, apart) in together.2.iter().zip(&apart.2) {
            assert!(distance(together, apart) < 1e-12, "{name}");
        }
        assert!(distance(&together.1, &apart.1) < 1e-12, "{name}");
    }
}

/// The arena of every recipe's training step is within 5 % of what is in use at its peak, and far below what the
/// activations are in all.
#[test]
fn the_arena_is_hardly_larger_than_what_is_in_use() {
    for name in ["digits", "vit-b16", "navit-b16", "navit-l16", "deit3-l16", "vit-22b-l16"] {
        let recipe = Recipe::load(name, &[]).unwrap();
        let mut graph = Graph::new();
        let outputs = vit::record(&mut graph, &recipe, 1000, 4096, 64, true).unwrap();
        let loss = loss::classification(&mut graph, outputs.logits, LossKind::Softmax, 0.0);
        graph.backward(&[(outputs.logits, loss.dlogits)]);
        graph.keep(loss.per_image);
        let graph = fused(&graph);
        let start = std::time::Instant::now();
        let layout = ArenaPlan::new(&graph, &Plan::new(&graph));
        println!("{name}: {} of {} bytes, {:?}", layout.bytes, layout.peak, start.elapsed());
        assert!(layout.bytes as f64 <= 1.05 * layout.peak as f64, "{name}");
        let all: usize = layout.slots.iter().flatten().map(|slot| slot.len()).sum();
        assert!(layout.peak < all, "{name}");
    }
}
