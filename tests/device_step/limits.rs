//! Which models have a kernel for everything, against what laying a step out on a device really takes.

use trencadis::autograd::device::BatchShape;
use trencadis::autograd::graph::Graph;
use trencadis::autograd::{DeviceExecutor, loss};
use trencadis::device::{Device, DeviceInfo};
use trencadis::models::{limits, vit};
use trencadis::recipe::*;
use trencadis::rng::{Purpose, Stream};

use crate::case::*;
use crate::support::batch;
use crate::support::devices::devices;
use crate::support::numbers::distance;

const POSITIONS: [(PositionBasis, PositionCombination); 8] = [
    (PositionBasis::None, PositionCombination::Sum),
    (PositionBasis::Learned, PositionCombination::Sum),
    (PositionBasis::Learned, PositionCombination::Joint),
    (PositionBasis::Learned, PositionCombination::Product),
    (PositionBasis::Learned, PositionCombination::Stack),
    (PositionBasis::Sinusoidal, PositionCombination::Sum),
    (PositionBasis::Sinusoidal, PositionCombination::Stack),
    (PositionBasis::Fourier, PositionCombination::Stack),
];
const POOLS: [PoolKind; 3] = [PoolKind::Map, PoolKind::Mean, PoolKind::Cls];

/// Lays a whole training step out on a device that is only planned for.
fn lay_out(config: &ModelConfig) -> trencadis::Result<()> {
    let mut recipe = Recipe { model: config.clone(), ..Recipe::default() };
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    let shape = BatchShape {
        tokens: TOKENS,
        slots: 6,
        patch_dim: config.patch_dim(),
        wide_patches: false,
        soft_classes: None,
        image_rows: TOKENS,
        longest: 9,
        texts: None,
        views: None,
    };
    let mut graph = Graph::new();
    let outputs = vit::record(&mut graph, &recipe, CLASSES, shape.tokens, shape.slots, true)?;
    let loss = loss::classification(&mut graph, outputs.logits, LossKind::Softmax.into());
    graph.backward(&[(outputs.logits, loss.dlogits)]);
    graph.keep(loss.per_image);
    let device = Device::planned(DeviceInfo::h100());
    DeviceExecutor::new(&device, &graph, shape, &|_| 0.0).map(drop)
}

/// Whether the model is one at all, and then what `check` says, which has to be what laying it out says.
fn compare(config: &ModelConfig) -> Option<bool> {
    config.validate().ok()?;
    let (checked, laid_out) = (limits::check(config), lay_out(config));
    assert_eq!(checked.is_ok(), laid_out.is_ok(), "{checked:?}, but {laid_out:?} for {config:?}");
    if let Err(error) = &checked {
        let said = error.to_string();
        assert!(said.starts_with("model.") && said.ends_with(", or use --device cpu"), "{said}");
        assert!(said.contains("has no kernel on a GPU: take ") && error.exit_code() == 2, "{said}");
    }
    Some(checked.is_ok())
}

/// Settings that no kernel depends on, drawn at random.
fn draw(config: &mut ModelConfig, stream: &mut Stream) {
    let mut yes = || stream.uniform() < 0.5;
    config.depth = 1 + usize::from(yes());
    config.mlp = if yes() { 20 } else { 7 };
    config.block = if yes() { BlockKind::Serial } else { BlockKind::Parallel };
    config.norm = if yes() { NormKind::LayerNorm } else { NormKind::Rms };
    config.gelu = if yes() { GeluKind::Erf } else { GeluKind::Tanh };
    config.qk_norm = match (yes(), yes()) {
        (true, true) => QkNormKind::Rms,
        (true, false) => QkNormKind::LayerNorm,
        (false, true) => QkNormKind::LayerNormBias,
        (false, false) => QkNormKind::None,
    };
    for flag in [
        &mut config.norm_bias,
        &mut config.patch_norm_out,
        &mut config.final_norm,
        &mut config.head_norm,
        &mut config.qk_norm_per_head,
        &mut config.qkv_bias,
        &mut config.proj_bias,
        &mut config.mlp_bias,
        &mut config.head_bias,
        &mut config.patch_bias,
        &mut config.class_token,
        &mut config.pool_mlp,
        &mut config.pool_qk_norm,
        &mut config.pool_query_norm,
        &mut config.pool_residual,
    ] {
        *flag = yes();
    }
    config.recompute = match (yes(), yes()) {
        (true, true) => Recompute::Full,
        (true, false) => Recompute::Selective,
        _ => Recompute::None,
    };
    config.registers = 3 * usize::from(yes());
    config.layer_scale = if yes() { 0.3 } else { 0.0 };
    config.drop_path = if yes() { 0.2 } else { 0.0 };
    config.position.coordinate =
        if yes() { PositionCoordinate::Absolute } else { PositionCoordinate::FractionalAspect };
    config.class_token |= config.pool == PoolKind::Cls;
}

/// Yes exactly where everything has a kernel: widths, heads, positions, pooling and patches in all combinations.
#[test]
fn checking_tells_what_laying_out_finds() {
    let base = variants()[0].1.clone();
    let mut stream = Stream::new(17, 0, 0, Purpose::Init);
    let mut counts = [0; 2];
    let mut count = |config: &ModelConfig| {
        if let Some(yes) = compare(config) {
            counts[usize::from(yes)] += 1;
        }
    };
    for width in [8, 12, 16, 24, 36, 40, 48, 60, 64] {
        for heads in 1..=4 {
            for head_dim in [0, 4, 8, 12, 40, 128, 136, 192, 256, 264] {
                for (basis, combination) in POSITIONS {
                    for pool in POOLS {
                        let mut config = ModelConfig { width, heads, head_dim, pool, ..base.clone() };
                        (config.position.basis, config.position.combination) = (basis, combination);
                        draw(&mut config, &mut stream);
                        count(&config);
                    }
                }
            }
        }
    }
    for patch in 1..=12 {
        for (channels, patch_norm_in) in [(1, false), (1, true), (3, false), (3, true)] {
            for _ in 0..8 {
                let mut config = ModelConfig { patch, channels, patch_norm_in, ..base.clone() };
                draw(&mut config, &mut stream);
                count(&config);
            }
        }
    }
    let [no, yes] = counts;
    println!("{yes} models with all kernels, {no} without");
    assert!(yes > 1000 && no > 1000, "{yes} and {no}");
}

/// Odd models that have all their kernels, run: the launches take what was laid out, and compute the step.
#[test]
fn what_has_its_kernels_runs() {
    let devices = devices();
    let mut stream = Stream::new(23, 0, 0, Purpose::Init);
    for i in 0..POSITIONS.len() {
        let (heads, head_dim, pool) = (1 + i % 3, [8, 24, 40][i / 3], POOLS[i % POOLS.len()]);
        let mut config = ModelConfig { width: 48, heads, head_dim, pool, ..variants()[0].1.clone() };
        (config.patch, config.patch_norm_in) = if i % 2 == 0 { (3, false) } else { (4, true) };
        (config.position.basis, config.position.combination) = POSITIONS[i];
        draw(&mut config, &mut stream);
        config.validate().unwrap();
        limits::check(&config).unwrap();
        let batch = batch(&GRIDS[..3], config.prefix(), config.patch_dim(), CLASSES, TOKENS, 2);
        let recorded = record(&config, &batch, LossKind::Softmax);
        let (loss, logits, grads) = on_cpu(&recorded, &batch);
        for device in &devices {
            let got = on_device(&mut executor(device, &recorded, &batch), &recorded, &batch);
            assert!(distance(&got.0, &loss) < 1e-3 && distance(&got.1, &logits) < 1e-3, "{config:?}");
            // Where drop path leaves an image of one token alone, what queries and keys get is rounding.
            let largest = |values: &[f64]| values.iter().fold(0f64, |most, x| most.max(x.abs()));
            let rounding = 1e-6 * grads.iter().map(|grad| largest(grad)).fold(0.0, f64::max);
            for ((param, got), want) in recorded.graph.params().iter().zip(&got.2).zip(&grads) {
                let (apart, most) = (distance(got, want), largest(got).max(largest(want)));
                assert!(
                    apart < 1e-3 || cancels(&config, &param.name) || most < rounding,
                    "the gradient of {} is {apart:.1e} apart, at most {most:.1e}: {config:?}",
                    param.name
                );
            }
        }
    }
}

/// The largest that has a kernel, and the first that has none.
#[test]
fn the_ends_of_the_ranges() {
    let base = ModelConfig { depth: 1, ..variants()[0].1.clone() };
    let with = |change: &dyn Fn(&mut ModelConfig)| {
        let mut config = base.clone();
        change(&mut config);
        config
    };
    for (fits, config) in [
        (true, with(&|c| (c.width, c.head_dim) = (8192, 8))),
        (false, with(&|c| (c.width, c.head_dim) = (8200, 8))),
        (true, with(&|c| (c.heads, c.head_dim) = (4096, 8))),
        (false, with(&|c| (c.heads, c.head_dim) = (4097, 8))),
        (true, with(&|c| (c.heads, c.head_dim, c.pool) = (4096, 8, PoolKind::Mean))),
        (false, with(&|c| (c.heads, c.head_dim, c.pool) = (4097, 8, PoolKind::Mean))),
        (true, with(&|c| (c.patch, c.channels, c.patch_norm_in) = (52, 3, true))),
        (false, with(&|c| (c.patch, c.channels, c.patch_norm_in) = (56, 3, true))),
        (true, with(&|c| (c.patch, c.channels) = (56, 3))),
        (true, with(&|c| (c.position.rows, c.position.columns) = (32_768, 32_768))),
        (false, with(&|c| (c.position.rows, c.position.columns) = (32_768, 32_769))),
        (true, with(&|c| c.attention_scale = f64::from(f32::MIN_POSITIVE))),
        (false, with(&|c| c.attention_scale = f64::from(f32::MIN_POSITIVE) / 2.0)),
    ] {
        assert_eq!(compare(&config), Some(fits), "{config:?}");
    }
}
