//! Whole networks against the implementations that they come from. `tools/make_goldens.py` wrote the
//! files; its results are computed in f64, so what differs is this crate's rounding.

#[path = "support/places.rs"]
mod places;

use std::path::Path;
use std::rc::Rc;

use places::golden;
use trencadis::autograd::ParamSpec;
use trencadis::data::batch::{PackedBatch, Patches, Targets};
use trencadis::eval::forward::{self, ForwardOutput, RawImage};
use trencadis::parallel::MeshGroups;
use trencadis::recipe::*;
use trencadis::train::engine::{CpuEngine, Engine, TrainState};
use trencadis::train::step::TrainStep;
use trencadis::weights::{Policy, Weights, assign, foreign};

/// Logits are of order 1; the mutations below show what this separates.
const TOLERANCE: f32 = 1e-5;

const CASES: &[&str] = &[
    "na_vit",
    "na_vit_nested",
    "naflex_gap",
    "naflex_gap_qk_norm",
    "naflex_par_gap",
    "naflex_factorized",
    "naflex_parfac",
    "naflex_map",
    "naflex_token",
    "naflex_siglip",
    "vit_cls",
    "vit_reg_gap",
    "deit3",
    "vit_parallel",
    "vit_parallel_fused",
    "siglip2",
    "naflex_rope",
    "naflex_rope_reference",
    "naflex_rope_grouped",
    "dinov3",
    "vit_map",
    "vit_cls_reg_qk",
    "vit_cls_gap",
    "vit_headless",
    "naflex_none",
    "naflex_avg_norm",
    "dinov2",
    "hf_vit",
    "hf_vit_model",
    "hf_dinov2",
    "hf_dinov2_registers",
    "hf_siglip",
    "hf_siglip_classifier",
    "vit_pytorch_cls",
    "vit_pytorch_mean",
    "vit_pytorch_simple",
    "big_vision_tok",
    "big_vision_map",
    "big_vision_sincos",
    "big_vision_naflex",
    "vit_jax",
];

fn read(path: &str) -> Weights {
    Weights::load(&golden(path)).unwrap()
}

fn recipe(path: &str) -> Recipe {
    Recipe::load(golden(path).to_str().unwrap(), &[]).unwrap()
}

fn images() -> Vec<RawImage> {
    forward::images_of(&read("images.safetensors").tensors).unwrap()
}

/// Our names and the settings that the file determines.
fn convert(case: &str) -> (Weights, Recipe) {
    let mut recipe = recipe(&format!("{case}/config.toml"));
    let weights =
        foreign::detect_and_convert(read(&format!("{case}/weights.safetensors")), &mut recipe.model).unwrap();
    (weights, recipe)
}

/// Largest difference, relative where values exceed 1.
fn difference(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    got.iter().zip(expected).map(|(g, e)| (g - e).abs() / e.abs().max(1.0)).fold(0.0, f32::max)
}

/// Largest difference of logits and features from what the case expects.
fn error_of(case: &str, output: &ForwardOutput) -> f32 {
    let expected = read(&format!("{case}/expected.safetensors")).tensors;
    assert!(!expected.is_empty());
    let of = |name: &str, got: &[f32]| expected.get(name).map_or(0.0, |(_, e)| difference(got, e));
    of("logits", &output.logits).max(of("features", &output.features))
}

#[test]
fn foreign_networks_give_their_own_logits() {
    let images = images();
    for case in CASES {
        let weights = read(&format!("{case}/weights.safetensors"));
        let output = forward::run(weights, &recipe(&format!("{case}/config.toml")), &images, None).unwrap();
        let error = error_of(case, &output);
        println!("{case:20} {error:.1e}");
        // Scores of na_vit are not divided by √head_dim, so its softmax magnifies rounding.
        let tolerance = if *case == "na_vit" { 2.5 * TOLERANCE } else { TOLERANCE };
        assert!(error < tolerance, "{case}: {error:e}");
    }
}

/// The same through the command line, from file to file.
#[test]
fn forward_writes_the_logits_of_na_vit() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.safetensors");
    let status = std::process::Command::new(places::program())
        .arg("forward")
        .arg("--weights")
        .arg(golden("na_vit/weights.safetensors"))
        .arg("--config")
        .arg(golden("na_vit/config.toml"))
        .arg("--input")
        .arg(golden("images.safetensors"))
        .arg("--output")
        .arg(&output)
        .status()
        .unwrap();
    assert!(status.success());
    let written = Weights::load(&output).unwrap().tensors;
    let expected = &read("na_vit/expected.safetensors").tensors["logits"];
    assert_eq!(written["logits"].0, expected.0);
    assert!(difference(&written["logits"].1, &expected.1) < 2.5 * TOLERANCE);
    // The third image has 5 x 5 patches.
    assert_eq!(written["tokens.2"].0, [25, 32]);
}

#[test]
fn packing_does_not_change_a_foreign_network() {
    let images = images();
    for case in CASES {
        let (weights, recipe) = convert(case);
        let packed = forward::run(weights.clone(), &recipe, &images, None).unwrap();
        for (i, image) in images.iter().enumerate() {
            let alone = forward::run(weights.clone(), &recipe, std::slice::from_ref(image), None).unwrap();
            let k = packed.classes;
            let error = difference(&packed.logits[i * k..(i + 1) * k], &alone.logits);
            assert!(error < 2e-6, "{case}, image {i}: {error:e}");
            assert!(difference(&packed.tokens[i], &alone.tokens[0]) < 5e-6, "{case}, image {i}");
        }
    }
}

#[test]
fn a_wrong_setting_does_not_pass() {
    type Change = fn(&mut ModelConfig);
    let mutations: &[(&str, &str, Change)] = &[
        ("na_vit", "norm epsilon", |m| m.norm_eps = 1e-6),
        ("na_vit", "score scale", |m| m.attention_scale = 0.0),
        ("na_vit", "query residual", |m| m.pool_residual = false),
        ("na_vit", "GELU", |m| m.gelu = GeluKind::Tanh),
        ("na_vit_nested", "query residual", |m| m.pool_residual = true),
        ("na_vit_nested", "QK-norm epsilon", |m| m.qk_norm_eps = 1e-3),
        ("naflex_gap", "norm epsilon", |m| m.norm_eps = 1e-5),
        ("naflex_gap", "GELU", |m| m.gelu = GeluKind::Tanh),
        ("naflex_gap", "filter", |m| m.position.resample = PositionResample::Bilinear),
        ("naflex_gap", "aspect", |m| m.position.coordinate = PositionCoordinate::FractionalAspect),
        ("naflex_parfac", "aspect", |m| m.position.coordinate = PositionCoordinate::Fractional),
        ("naflex_rope", "base of the angles", |m| m.rope.theta = 60.0),
        ("naflex_rope", "pairs", |m| m.rope.kind = Rope::Halves),
        ("naflex_rope_reference", "order", |m| m.rope.order = RopeOrder::Rows),
        ("naflex_rope_reference", "grid", |m| m.rope.columns = 5),
        ("naflex_rope_grouped", "coordinate", |m| m.rope.coordinate = RopeCoordinate::CenteredLonger),
        ("dinov3", "coordinate", |m| m.rope.coordinate = RopeCoordinate::Ends),
        ("dinov3", "no rotation", |m| m.rope.kind = Rope::None),
        ("naflex_siglip", "filter", |m| m.position.resample = PositionResample::Bicubic),
        ("vit_parallel", "serial blocks' norm", |m| m.norm = NormKind::LayerNorm),
        ("siglip2", "GELU", |m| m.gelu = GeluKind::Erf),
        ("vit_map", "GELU", |m| m.gelu = GeluKind::Erf),
        ("vit_cls_reg_qk", "QK-norm epsilon", |m| m.qk_norm_eps = 1e-3),
        ("vit_cls_gap", "pool", |m| m.pool = PoolKind::Cls),
        ("naflex_none", "pool", |m| m.pool = PoolKind::Cls),
        ("naflex_avg_norm", "aspect", |m| m.position.coordinate = PositionCoordinate::FractionalAspect),
        ("dinov2", "filter", |m| m.position.resample = PositionResample::BicubicNoAntialias),
        ("hf_vit", "filter", |m| m.position.resample = PositionResample::Bicubic),
        ("hf_vit", "GELU", |m| m.gelu = GeluKind::Tanh),
        ("hf_vit_model", "norm epsilon", |m| m.norm_eps = 1e-4),
        ("hf_dinov2", "filter", |m| m.position.resample = PositionResample::BicubicOffset),
        ("hf_dinov2_registers", "filter", |m| m.position.resample = PositionResample::BicubicNoAntialias),
        ("hf_siglip", "filter", |m| m.position.resample = PositionResample::Bilinear),
        ("hf_siglip_classifier", "GELU", |m| m.gelu = GeluKind::Erf),
        ("vit_pytorch_cls", "order of positions", |m| {
            m.position.combination = PositionCombination::Joint;
        }),
        ("vit_pytorch_mean", "norm epsilon", |m| m.norm_eps = 1e-6),
        ("vit_pytorch_simple", "coordinate", |m| m.position.coordinate = PositionCoordinate::Fractional),
        ("big_vision_tok", "filter", |m| m.position.resample = PositionResample::Linear),
        ("big_vision_map", "GELU", |m| m.gelu = GeluKind::Erf),
        ("big_vision_sincos", "coordinate", |m| m.position.coordinate = PositionCoordinate::Fractional),
        ("big_vision_naflex", "filter", |m| m.position.resample = PositionResample::LinearAlignCorners),
        ("vit_jax", "filter", |m| m.position.resample = PositionResample::Bilinear),
    ];
    let images = images();
    for (case, what, change) in mutations {
        let (weights, mut recipe) = convert(case);
        change(&mut recipe.model);
        let error = error_of(case, &forward::run(weights, &recipe, &images, None).unwrap());
        println!("{case:20} {what:20} {error:.1e}");
        assert!(error > 2.5 * TOLERANCE, "{case} does not notice a wrong {what}: {error:e}");
    }
}

#[test]
fn shapes_tell_the_settings() {
    let model = |case: &str| convert(case).1.model;
    let m = model("na_vit");
    assert_eq!((m.width, m.depth, m.mlp, m.heads, m.head_dim), (32, 2, 48, 3, 16));
    assert_eq!((m.patch, m.channels, m.position.rows, m.position.columns), (4, 3, 8, 8));
    assert!(m.patch_norm_in && m.patch_norm_out && m.head_norm && m.pool_query_norm && m.pool_residual);
    assert!(!m.qkv_bias && !m.norm_bias && !m.head_bias && m.mlp_bias && m.qk_norm_per_head);

    let m = model("na_vit_nested");
    assert!(m.norm_bias && !m.pool_residual && !m.qk_norm_per_head);
    assert_eq!(m.qk_norm, QkNormKind::LayerNorm);

    let m = model("naflex_map");
    assert_eq!((m.pool, m.registers, m.class_token), (PoolKind::Map, 1, true));
    assert!(m.pool_mlp && !m.pool_qk_norm && m.final_norm && !m.head_norm);
    assert_eq!((m.position.rows, m.position.columns), (5, 6));

    let m = model("naflex_gap_qk_norm");
    assert_eq!((m.qk_norm, m.pool, m.heads), (QkNormKind::LayerNormBias, PoolKind::Mean, 2));
    assert!(m.layer_scale > 0.0 && !m.final_norm && m.head_norm);

    let m = model("vit_parallel");
    assert_eq!((m.block, m.norm, m.qk_norm), (BlockKind::Parallel, NormKind::Rms, QkNormKind::Rms));
    assert!(!m.qkv_bias && m.mlp_bias && m.proj_bias);

    // A network without a classifier gets the identity: its logits are its features.
    let (weights, recipe) = convert("siglip2");
    let output = forward::run(weights, &recipe, &images(), None).unwrap();
    assert_eq!(output.logits, output.features);
}

#[test]
fn weights_that_are_not_understood_are_refused_by_name() {
    let mistake = |case: &str, change: &dyn Fn(&mut Weights, &mut ModelConfig)| {
        let mut model = recipe(&format!("{case}/config.toml")).model;
        let mut weights = read(&format!("{case}/weights.safetensors"));
        change(&mut weights, &mut model);
        let Err(error) = foreign::detect_and_convert(weights, &mut model) else {
            panic!("{case}: wrong weights are taken")
        };
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let scalar = || (vec![1], vec![0.0f32]);
    let cases = [
        (
            mistake("na_vit", &|w, _| {
                w.tensors.get_mut("transformer.norm.beta").unwrap().1[3] = 0.1;
            }),
            "transformer.norm.beta is not zero",
        ),
        (
            mistake("na_vit", &|w, _| {
                w.tensors.remove("attn_pool.to_kv.weight");
            }),
            "weights of vit-pytorch's NaViT: missing: attn_pool.to_kv.weight",
        ),
        (
            mistake("na_vit_nested", &|w, _| {
                w.tensors.insert("pos_embed_frame".into(), scalar());
            }),
            "pos_embed_frame: video, a third position table, belongs to a variant",
        ),
        (
            mistake("naflex_gap", &|w, _| {
                w.tensors.insert("rope.freqs".into(), scalar());
            }),
            "weights of timm's NaFlexVit: rope.freqs: learned frequencies of rotary positions belong to a variant",
        ),
        (mistake("naflex_gap", &|_, m| m.heads = 5), "set model.heads to a divisor of 32"),
        (
            mistake("vit_cls", &|w, _| {
                w.tensors.insert("pos_embed".into(), (vec![1, 23, 32], vec![0.0; 23 * 32]));
            }),
            "pos_embed has 23 rows, which is no square grid",
        ),
        (
            mistake("deit3", &|w, _| {
                let (shape, _) = w.tensors.get_mut("blocks.1.gamma_1").unwrap();
                *shape = vec![2, 16];
                w.tensors.remove("blocks.0.attn.qkv.weight");
            }),
            "of another shape: blocks.1.gamma_1 [2, 16] (expected [32]); missing: blocks.0.attn.qkv.weight",
        ),
        (
            mistake("siglip2", &|w, _| {
                let table = "embeddings.position_embedding.weight";
                let name = w.tensors.keys().find(|n| n.ends_with(table)).unwrap().clone();
                w.tensors.insert(name, (vec![24, 32], vec![0.0; 24 * 32]));
            }),
            "has 24 rows, which is no square grid",
        ),
        (mistake("vit_cls", &|w, _| w.tensors.clear()), "names of no known implementation"),
    ];
    for (message, part) in cases {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

/// Packs images for training, one after another, into `tokens` rows and `slots` slots.
fn pack(images: &[RawImage], classes: &[i32], patch: usize, tokens: usize, slots: usize) -> PackedBatch {
    let (mut values, mut positions, mut cu_seqlens, mut grids) = (vec![], vec![], vec![0], vec![]);
    for (shape, pixels) in images {
        let [channels, height, width] = shape[..] else { panic!("an image is [C, H, W]") };
        for row in 0..height / patch {
            for column in 0..width / patch {
                positions.push([row as u16, column as u16]);
                for c in 0..channels {
                    for y in row * patch..(row + 1) * patch {
                        let start = (c * height + y) * width + column * patch;
                        values.extend_from_slice(&pixels[start..start + patch]);
                    }
                }
            }
        }
        cu_seqlens.push(positions.len() as i32);
        grids.push([(height / patch) as u16, (width / patch) as u16]);
    }
    let patch_dim = images[0].0[0] * patch * patch;
    let used = images.len();
    positions.resize(tokens, [0, 0]);
    values.resize(tokens * patch_dim, 0.0);
    cu_seqlens.resize(slots + 1, cu_seqlens[used]);
    grids.resize(slots, [0, 0]);
    let mut targets = classes.to_vec();
    targets.resize(slots, 0);
    PackedBatch {
        patches: Patches::F32(values),
        patch_dim,
        cu_seqlens,
        positions,
        grids,
        targets: Targets::Classes(targets),
        weights: (0..slots).map(|i| if i < used { 1.0 } else { 0.0 }).collect(),
        sample_ids: (0..slots as u64).collect(),
        epochs: vec![0; slots],
        images: used,
        texts: None,
    }
}

/// The tensors of `file` under `prefix`, in the order of `params`.
fn ordered(file: &Weights, prefix: &str, params: &[ParamSpec]) -> Vec<Vec<f32>> {
    let tensors = file
        .tensors
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor.clone())))
        .collect();
    let weights = Weights { tensors, ..Weights::default() };
    assign(Path::new(prefix), weights, params, Policy::Exact).unwrap().0
}

/// Loss, every gradient, three AdamW steps and the parameters after them, as PyTorch has them; once
/// with all images in one batch and once accumulated over two.
#[test]
fn training_steps_are_those_of_pytorch() {
    let images = images();
    for kind in ["serial", "parallel"] {
        let file = read(&format!("train_step/{kind}.safetensors"));
        let recipe = recipe(&format!("train_step/{kind}.toml"));
        let classes: Vec<i32> = file.tensors["classes"].1.iter().map(|c| *c as i32).collect();
        let losses = &file.tensors["losses"].1;
        let (patch, tokens) = (recipe.model.patch, recipe.packing.tokens);
        for split in [4, 1] {
            let batches: Vec<_> = [0..split, split..4]
                .into_iter()
                .filter(|range| !range.is_empty())
                .map(|range| pack(&images[range.clone()], &classes[range], patch, tokens, 5))
                .collect();
            let step = TrainStep::new(&recipe, 6, 5).unwrap();
            let specs = step.params().to_vec();
            let [params, grads, after] =
                ["param.", "grad.", "after."].map(|kind| ordered(&file, kind, &specs));
            let mut engine = CpuEngine::new(
                &recipe,
                step,
                5,
                &TrainState::fresh(params, false),
                Rc::new(MeshGroups::alone()),
            )
            .unwrap();
            for (n, expected) in losses.iter().enumerate() {
                let outcome = if n < 3 {
                    engine.queue(&batches, recipe.train.lr).unwrap();
                    engine.collect().unwrap()
                } else {
                    engine.gradients(&batches).unwrap()
                };
                let error = (outcome.loss as f32 - expected).abs();
                assert!(error < 2e-5, "{kind}, step {n}: loss {} and not {expected}", outcome.loss);
                if n == 0 {
                    for ((spec, got), expected) in specs.iter().zip(engine.grads()).zip(&grads) {
                        let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                        let worst = got.iter().zip(expected).fold(0.0f32, |m, (g, e)| m.max((g - e).abs()));
                        assert!(scale > 1e-4, "{kind}: {} has no gradient to compare", spec.name);
                        assert!(
                            worst < 1e-5 * scale.max(0.1),
                            "{kind}: gradient of {} off by {worst:e} of {scale:e}",
                            spec.name
                        );
                    }
                }
            }
            let trained = engine.state().unwrap().weights;
            for ((spec, got), expected) in specs.iter().zip(trained.iter()).zip(&after) {
                let error = difference(got, expected);
                assert!(error < 2e-4, "{kind}: {} after three steps is off by {error:e}", spec.name);
            }
        }
    }
}
