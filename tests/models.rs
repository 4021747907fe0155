//! Whole models: an image's result does not depend on what it is packed with (the central test),
//! parameter counts are the published ones, and the gradient of a whole model is right.

mod support;

use support::{batch, gradcheck};
use trencadis::autograd::Workload;
use trencadis::autograd::graph::Graph;
use trencadis::eval::model::{Keep, Model};
use trencadis::models::vit;
use trencadis::nn::init::initialise;
use trencadis::recipe::*;

const GRIDS: [[u16; 2]; 5] = [[4, 3], [1, 1], [7, 2], [1, 9], [5, 5]];
const CLASSES: usize = 5;

/// A small model with everything that matters different from its default somewhere in the list.
fn variants() -> Vec<(&'static str, ModelConfig)> {
    let position = PositionConfig { rows: 9, columns: 11, ..PositionConfig::default() };
    let base = ModelConfig {
        shape: String::new(),
        width: 24,
        depth: 2,
        mlp: 40,
        heads: 3,
        patch: 2,
        channels: 3,
        position: position.clone(),
        ..ModelConfig::default()
    };
    let with = |change: &dyn Fn(&mut ModelConfig)| {
        let mut config = base.clone();
        change(&mut config);
        config
    };
    vec![
        ("navit", base.clone()),
        ("parallel", with(&|c| c.block = BlockKind::Parallel)),
        (
            "vit",
            with(&|c| {
                c.pool = PoolKind::Cls;
                c.class_token = true;
                c.qk_norm = QkNormKind::None;
                (c.norm_bias, c.qkv_bias, c.proj_bias) = (true, true, true);
                c.layer_scale = 0.3;
                c.position.coordinate = PositionCoordinate::Fractional;
                c.position.combination = PositionCombination::Joint;
                c.position.resample = PositionResample::Bicubic;
            }),
        ),
        (
            "registers and mean pooling",
            with(&|c| {
                c.pool = PoolKind::Mean;
                c.registers = 3;
                c.norm = NormKind::Rms;
                c.qk_norm = QkNormKind::LayerNormBias;
                c.head_norm = true;
                c.position.basis = PositionBasis::Fourier;
                c.position.coordinate = PositionCoordinate::FractionalAspect;
            }),
        ),
        (
            "siglip head",
            with(&|c| {
                c.pool_mlp = true;
                c.registers = 1;
                c.gelu = GeluKind::Tanh;
                c.qk_norm_per_head = false;
                c.position.basis = PositionBasis::Sinusoidal;
                c.position.combination = PositionCombination::Stack;
            }),
        ),
        (
            "rotary positions and shared keys",
            with(&|c| {
                (c.heads, c.kv_heads, c.head_dim) = (4, 2, 8);
                c.registers = 2;
                c.position.basis = PositionBasis::None;
                c.rope = RopeConfig { kind: Rope::Halves, theta: 20.0, ..RopeConfig::default() };
            }),
        ),
        (
            "rotary positions of centred coordinates",
            with(&|c| {
                (c.head_dim, c.class_token) = (8, true);
                c.qk_norm = QkNormKind::LayerNormBias;
                c.rope = RopeConfig {
                    kind: Rope::Interleaved,
                    frequencies: RopeFrequencies::Turns,
                    theta: 10.0,
                    coordinate: RopeCoordinate::CenteredLonger,
                    order: RopeOrder::ColumnRow,
                    ..RopeConfig::default()
                };
            }),
        ),
        (
            "vit-pytorch",
            with(&|c| {
                c.head_dim = 5;
                c.attention_scale = 1.0;
                (c.patch_norm_in, c.patch_norm_out) = (true, true);
                (c.pool_query_norm, c.pool_residual) = (true, true);
                c.position.combination = PositionCombination::Product;
            }),
        ),
    ]
}

fn recipe(model: &ModelConfig) -> Recipe {
    Recipe { model: model.clone(), ..Recipe::default() }
}

fn run(config: &ModelConfig, grids: &[[u16; 2]], tokens: usize, spare: usize) -> (Vec<f32>, Vec<Vec<f32>>) {
    let b = batch(grids, config.prefix(), config.patch_dim(), CLASSES, tokens, spare);
    let mut model = Model::new(&recipe(config), CLASSES, b.tokens(), b.slots(), Keep::Features).unwrap();
    // Ten times the usual scale, so that attention and norms do something.
    let params: Vec<Vec<f32>> = initialise(model.params(), 5)
        .into_iter()
        .zip(model.params())
        .map(|(values, spec)| if spec.decay { values.iter().map(|v| v * 10.0).collect() } else { values })
        .collect();
    let logits = model.run(&params, &b)[..grids.len() * CLASSES].to_vec();
    let width = config.width;
    let tokens = (0..grids.len())
        .map(|i| model.tokens()[b.range(i).start * width..b.range(i).end * width].to_vec())
        .collect();
    (logits, tokens)
}

fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= 1e-6 * (1.0 + w.abs()), "{what}[{i}]: {g} against {w}");
    }
}

#[test]
fn packed_equals_alone() {
    for (name, config) in variants() {
        let (packed, packed_tokens) = run(&config, &GRIDS, 256, 3);
        assert!(packed.iter().any(|x| x.abs() > 1e-2), "{name}: the logits are all but zero");
        for (i, grid) in GRIDS.iter().enumerate() {
            let (alone, alone_tokens) = run(&config, &[*grid], 0, 0);
            assert_close(&format!("{name}, logits of {grid:?}"), &packed[i * CLASSES..][..CLASSES], &alone);
            assert_close(&format!("{name}, tokens of {grid:?}"), &packed_tokens[i], &alone_tokens[0]);
        }
    }
}

#[test]
fn images_do_see_their_own_patches() {
    for (name, config) in variants() {
        let (logits, _) = run(&config, &[[4, 3], [3, 4]], 0, 0);
        assert_ne!(logits[..CLASSES], logits[CLASSES..], "{name}");
    }
}

#[test]
fn whole_models_against_finite_differences() {
    for (name, mut config) in variants() {
        (config.width, config.heads, config.mlp, config.depth) = (6, 2, 5, 1);
        config.kv_heads = config.kv_heads.min(1);
        config.head_dim = match config.rope.kind {
            Rope::None => config.head_dim.min(2),
            _ => 4,
        };
        config.drop_path = 0.2;
        config.recompute = if config.registers > 0 { Recompute::Full } else { Recompute::Selective };
        let grids = [[2, 1], [1, 1], [2, 3]];
        let b = batch(&grids, config.prefix(), config.patch_dim(), 2, 24, 1);
        gradcheck(name, &b, |g| vit::record(g, &recipe(&config), 2, 24, 4, true).unwrap().logits);
    }
}

/// Parameters in millions with a 1,000-class head, as published (facts: big_vision's shape table).
#[test]
fn parameter_counts_are_the_published_ones() {
    for (name, patch, millions) in [
        ("Ti", 16, 5.72),
        ("S", 16, 22.05),
        ("M", 16, 38.84),
        ("B", 16, 86.57),
        ("L", 16, 304.3),
        ("H", 14, 632.0),
        ("g", 14, 1012.6),
        ("G", 14, 1844.4),
        ("So400m", 14, 413.6),
        ("g-opt", 14, 1136.0),
        ("G-opt", 14, 1665.0),
        ("e", 14, 3807.0),
    ] {
        let mut plain = Recipe::load("vit-b16", &[]).unwrap();
        let grid = 224 / patch;
        plain.model.shape = name.into();
        plain.model.patch = patch;
        (plain.model.position.rows, plain.model.position.columns) = (grid, grid);
        let mut graph = Graph::new();
        vit::record(&mut graph, &plain, 1000, 256, 1, false).unwrap();
        let got = graph.parameter_count() as f64 / 1e6;
        assert!((got / millions - 1.0).abs() < 2e-3, "{name}: {got} M parameters, published {millions} M");
    }
}

/// GMAC of a forward pass at 224 pixels, as published.
#[test]
fn flops_are_the_published_ones() {
    let plain = Recipe::load("vit-b16", &[]).unwrap();
    let mut graph = Graph::new();
    vit::record(&mut graph, &plain, 1000, 256, 1, false).unwrap();
    let work = Workload { tokens: 197.0, images: 1.0, sum_squared: 197.0 * 197.0, texts: [0.0; 2] };
    let gmac = graph.flops(&work) / 2e9;
    assert!((gmac - 17.5).abs() < 0.2, "ViT-B/16 takes {gmac} GMAC, published 17.4 to 17.6");
}

#[test]
fn vit_22b_is_recorded_without_allocating_it() {
    let recipe = Recipe::load("vit-22b", &[]).unwrap();
    let mut graph = Graph::new();
    vit::record(&mut graph, &recipe, 1000, 4096, 16, true).unwrap();
    let billions = graph.parameter_count() as f64 / 1e9;
    assert!((21.5..22.3).contains(&billions), "{billions} billion parameters");
    // The published 21,743 M are the matrices of the encoder.
    let matrices =
        |p: &&trencadis::autograd::ParamSpec| p.name.starts_with("blocks.") && p.name.ends_with("weight");
    let encoder: usize = graph.params().iter().filter(matrices).map(|p| p.len()).sum();
    assert_eq!(encoder, 21_743_271_936);
}
