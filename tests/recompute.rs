//! What the backward pass computes again: the same bits, what is kept for it, and what that saves.

use std::collections::{HashMap, HashSet};

use trencadis::autograd::device::{ArenaPlan, fused};
use trencadis::autograd::graph::{Graph, Kind, Tensor};
use trencadis::autograd::{CpuExecutor, Pass, Plan, StepState};
use trencadis::nn::init::initialise;
use trencadis::recipe::*;
use trencadis::train::step::TrainStep;

mod support;

use support::batch;

const TOKENS: usize = 128;
const CLASSES: usize = 4;
const SLOTS: usize = 6;
const WIDTH: usize = 32;
const HEADS: usize = 2;

fn base(block: BlockKind) -> ModelConfig {
    ModelConfig {
        shape: String::new(),
        width: WIDTH,
        depth: 3,
        mlp: 4 * WIDTH,
        heads: HEADS,
        patch: 2,
        channels: 1,
        block,
        position: PositionConfig { rows: 9, columns: 11, ..PositionConfig::default() },
        ..ModelConfig::default()
    }
}

fn step(model: &ModelConfig, recompute: Recompute) -> TrainStep {
    let mut recipe = Recipe { model: ModelConfig { recompute, ..model.clone() }, ..Recipe::default() };
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    recipe.packing.tokens = TOKENS;
    TrainStep::new(&recipe, CLASSES, SLOTS).unwrap()
}

/// Every kind of block, norm and bias, with what may stand on a branch.
fn models() -> Vec<(&'static str, ModelConfig)> {
    use BlockKind::{Parallel, Serial};
    let everything = |block| ModelConfig {
        norm_bias: true,
        qk_norm: QkNormKind::LayerNormBias,
        qkv_bias: true,
        proj_bias: true,
        layer_scale: 0.3,
        drop_path: 0.4,
        patch_norm_in: true,
        patch_norm_out: true,
        head_norm: true,
        pool_mlp: true,
        pool_query_norm: true,
        gelu: GeluKind::Tanh,
        ..base(block)
    };
    let little = |block| ModelConfig {
        norm: NormKind::Rms,
        qk_norm: QkNormKind::None,
        mlp_bias: false,
        pool: PoolKind::Mean,
        final_norm: false,
        ..base(block)
    };
    vec![
        ("serial", base(Serial)),
        ("parallel", base(Parallel)),
        ("serial with everything", everything(Serial)),
        ("parallel with everything", everything(Parallel)),
        ("serial with little", little(Serial)),
        ("parallel with little", little(Parallel)),
    ]
}

#[test]
fn gradients_are_the_same_bits() {
    for (name, model) in models() {
        let batch = batch(&[[4, 3], [1, 1], [7, 2], [1, 9]], 0, model.patch_dim(), CLASSES, TOKENS, 2);
        let [kept, selective, full] = Recompute::ALL.map(|recompute| {
            let step = step(&model, recompute);
            let mut params = initialise(step.params(), 3);
            params.iter_mut().flatten().enumerate().for_each(|(i, x)| *x = 3.0 * *x + 0.01 * (i % 7) as f32);
            let mut grads: Vec<Vec<f32>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
            let state = StepState { seed: 7, loss_scale: 0.25 };
            let mut executor = CpuExecutor::<f32>::new();
            executor.run(step.graph(), step.plan(), &params, &mut grads, &HashMap::new(), &batch, &state);
            let again =
                step.plan().order.iter().filter(|&&i| step.graph().nodes()[i].pass == Pass::Again).count();
            (executor.value(step.per_image()).to_vec(), grads, again)
        });
        assert!(kept.1.iter().flatten().filter(|x| **x != 0.0).count() > 10_000, "{name}");
        assert_eq!((&selective.0, &selective.1), (&kept.0, &kept.1), "{name}: selective");
        assert_eq!((&full.0, &full.1), (&kept.0, &kept.1), "{name}: full");
        // Both norms and GELU of a serial block, one norm of a parallel one, each once.
        let of_blocks = model.depth * if model.block == BlockKind::Serial { 3 } else { 2 };
        assert_eq!(kept.2, 0, "{name}");
        assert!((of_blocks..of_blocks + 7).contains(&selective.2), "{name}: {} nodes again", selective.2);
        assert!(full.2 > selective.2, "{name}: {} nodes again", full.2);
    }
}

/// Elements a token that the forward pass leaves for what comes after it.
fn kept(graph: &Graph) -> f64 {
    let plan = Plan::new(graph);
    let nodes = || plan.order.iter().map(|&i| &graph.nodes()[i]);
    let forward = |pass| pass == Pass::Forward;
    let of = |made: bool| {
        let nodes = nodes().filter(move |node| forward(node.pass) == made);
        nodes.flat_map(move |node| if made { &node.outputs } else { &node.inputs }).flatten().copied()
    };
    let made: HashSet<Tensor> =
        of(true).filter(|tensor| graph.info(*tensor).kind == Kind::Activation).collect();
    let read: HashSet<Tensor> = of(false).collect();
    made.intersection(&read).map(|tensor| graph.info(*tensor).len() as f64).sum::<f64>() / TOKENS as f64
}

/// The table of docs/training.md: what one block more keeps, and adds to the peak, on both kinds of devices.
#[test]
fn a_block_keeps_what_is_documented() {
    use BlockKind::{Parallel, Serial};
    // Mean and deviation of a norm; the log-sum-exp of a head.
    let (norm, lse) = (2.0, HEADS as f64);
    for (block, layer_scale, widths, statistics) in [
        (Serial, 0.0, [16, 10, 1], [2.0 * norm + lse, lse, 0.0]),
        (Serial, 0.1, [18, 12, 1], [2.0 * norm + lse, lse, 0.0]),
        (Parallel, 0.0, [14, 9, 1], [norm + lse, lse, 0.0]),
        (Parallel, 0.1, [16, 11, 1], [norm + lse, lse, 0.0]),
    ] {
        for drop_path in [0.0, 0.2] {
            let model = ModelConfig { layer_scale, drop_path, ..base(block) };
            for (i, recompute) in Recompute::ALL.into_iter().enumerate() {
                let [five, six] =
                    [5, 6].map(|depth| step(&ModelConfig { depth, ..model.clone() }, recompute));
                let want = (widths[i] * WIDTH) as f64 + statistics[i];
                let what = format!("{block:?}, LayerScale {layer_scale}, {}", recompute.name());
                assert_eq!(kept(six.graph()) - kept(five.graph()), want, "{what}");
                let [five_fused, six_fused] = [&five, &six].map(|step| fused(step.graph()));
                assert_eq!(kept(&six_fused) - kept(&five_fused), want, "{what}, on a device");

                let more = six.plan().peak_elements - five.plan().peak_elements;
                assert_eq!(more as f64 / TOKENS as f64, want, "{what}: the peak");
                let arena = |graph: &Graph| ArenaPlan::new(graph, &Plan::new(graph)).peak;
                let more = arena(&six_fused) - arena(&five_fused);
                let bytes = (2 * widths[i] * WIDTH) as f64 + 4.0 * statistics[i];
                assert_eq!(more as f64 / TOKENS as f64, bytes, "{what}: the arena");
            }
        }
    }
}

/// An evaluation has no backward pass, whatever the recipe says.
#[test]
fn forward_passes_are_as_they_were() {
    let model = base(BlockKind::Serial);
    let [kept, selective, full] =
        Recompute::ALL.map(|recompute| step(&model, recompute).evaluation()[0].render());
    assert!(kept == selective && kept == full);
}
