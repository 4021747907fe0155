//! Small models, recorded steps and how they run.

use std::collections::HashMap;

use half::bf16;
use trencadis::autograd::device::BatchShape;
use trencadis::autograd::graph::{Graph, Init, Tensor};
use trencadis::autograd::loss;
use trencadis::autograd::{CpuExecutor, DeviceExecutor, Plan, StepState};
use trencadis::data::batch::PackedBatch;
use trencadis::device::Device;
use trencadis::models::vit;
use trencadis::ops::ClassificationLoss;
use trencadis::recipe::*;

use crate::support::numbers::random;

pub const GRIDS: [[u16; 2]; 5] = [[4, 3], [1, 1], [7, 2], [1, 9], [5, 5]];
/// Not a multiple of 8, so that the head's rows are padded.
pub const CLASSES: usize = 10;
pub const TOKENS: usize = 128;
pub const STEP: StepState = StepState { seed: 11, loss_scale: 0.2 };

/// Small models in which every op of the graph and every kind of block, norm, pool and position stands somewhere.
pub fn variants() -> Vec<(&'static str, ModelConfig)> {
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
                c.recompute = Recompute::Full;
            }),
        ),
        (
            "parallel",
            with(&|c| {
                (c.block, c.norm, c.pool) = (BlockKind::Parallel, NormKind::Rms, PoolKind::Mean);
                (c.qk_norm, c.qk_norm_per_head) = (QkNormKind::LayerNormBias, false);
                (c.registers, c.head_norm, c.patch_norm_out) = (3, true, true);
                (c.drop_path, c.layer_scale, c.recompute) = (0.4, 0.5, Recompute::Selective);
                c.position.basis = PositionBasis::Fourier;
                c.position.coordinate = PositionCoordinate::FractionalAspect;
            }),
        ),
        (
            "pooling with an mlp",
            with(&|c| {
                (c.pool_mlp, c.pool_residual, c.pool_query_norm) = (true, true, true);
                (c.gelu, c.drop_path, c.recompute) = (GeluKind::Tanh, 0.3, Recompute::Selective);
                c.position.basis = PositionBasis::Sinusoidal;
                c.position.combination = PositionCombination::Stack;
            }),
        ),
        (
            "rotary positions and shared keys",
            with(&|c| {
                (c.heads, c.kv_heads, c.registers) = (4, 2, 2);
                c.position.basis = PositionBasis::None;
                c.rope = RopeConfig { kind: Rope::Halves, theta: 20.0, ..RopeConfig::default() };
            }),
        ),
        (
            "rotary positions without a norm",
            with(&|c| {
                (c.block, c.qk_norm, c.recompute) = (BlockKind::Parallel, QkNormKind::None, Recompute::Full);
                (c.heads, c.kv_heads) = (4, 1);
                c.rope = RopeConfig {
                    kind: Rope::Interleaved,
                    frequencies: RopeFrequencies::Turns,
                    theta: 10.0,
                    coordinate: RopeCoordinate::Centered,
                    order: RopeOrder::ColumnRow,
                    ..RopeConfig::default()
                };
            }),
        ),
    ]
}

pub struct Recorded {
    pub graph: Graph,
    pub logits: Tensor,
    pub per_image: Tensor,
    /// Values that bf16 holds exactly.
    pub params: Vec<Vec<f32>>,
}

pub fn record(config: &ModelConfig, batch: &PackedBatch, kind: LossKind) -> Recorded {
    let mut recipe = Recipe { model: config.clone(), ..Recipe::default() };
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    let mut graph = Graph::new();
    let outputs = vit::record(&mut graph, &recipe, CLASSES, batch.tokens(), batch.slots(), true).unwrap();
    let of = ClassificationLoss { smoothing: 0.1, ..kind.into() };
    let loss = loss::classification(&mut graph, outputs.logits, of);
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
pub type Outcome = (Vec<f64>, Vec<f64>, Vec<Vec<f64>>);

pub fn on_cpu(recorded: &Recorded, batch: &PackedBatch) -> Outcome {
    let wide = |x: &Vec<f32>| x.iter().map(|&x| f64::from(x)).collect();
    let params: Vec<Vec<f64>> = recorded.params.iter().map(wide).collect();
    let mut grads: Vec<Vec<f64>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
    let mut executor = CpuExecutor::<f64>::new();
    let plan = Plan::new(&recorded.graph);
    executor.run(&recorded.graph, &plan, &params, &mut grads, &HashMap::new(), batch, &STEP);
    (executor.value(recorded.per_image).to_vec(), executor.value(recorded.logits).to_vec(), grads)
}

pub fn executor(device: &Device, recorded: &Recorded, batch: &PackedBatch) -> DeviceExecutor {
    let executor = DeviceExecutor::new(device, &recorded.graph, BatchShape::of(batch), &|_| 0.0).unwrap();
    executor.params().write(executor.stream(), &recorded.params).unwrap();
    assert_eq!(executor.params().read().unwrap(), recorded.params);
    executor
}

pub fn on_device(executor: &mut DeviceExecutor, recorded: &Recorded, batch: &PackedBatch) -> Outcome {
    executor.write(batch, &STEP).unwrap();
    executor.zero_grads().unwrap();
    executor.launch(0).unwrap();
    let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect();
    (
        wide(executor.value(recorded.per_image).unwrap()),
        wide(executor.value(recorded.logits).unwrap()),
        executor.read_grads().unwrap().into_iter().map(wide).collect(),
    )
}

pub fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// Whether the gradient of a parameter is rounding alone: without a rotation, which pooling never has, a bias on k cancels
/// in the softmax.
pub fn cancels(config: &ModelConfig, name: &str) -> bool {
    name.ends_with("k_norm.bias") && (config.rope.kind == Rope::None || name.starts_with("pool."))
}
