//! DeiT III's stages against the commands of its repository (README_revenge.md).

use trencadis::recipe::{CropKind, LossKind, OptimizerKind, Recipe};

use super::load;

/// Images of ImageNet-1k and of ImageNet-21k.
const SETS: [f64; 2] = [1_281_167.0, 14_197_122.0];

/// What a stage is trained with.
struct Stage {
    name: &'static str,
    /// Width, depth, patch.
    model: (usize, usize, usize),
    resolution: usize,
    /// 0: ImageNet-1k, 1: ImageNet-21k.
    set: usize,
    epochs: f64,
    batch: usize,
    lr: f64,
    weight_decay: f64,
    drop_path: f64,
    kind: Kind,
}

#[derive(PartialEq)]
enum Kind {
    Pretraining,
    /// FixRes: AdamW and RandAugment.
    HigherResolution,
    /// ImageNet-21k, and what follows it.
    Large,
}
use Kind::{HigherResolution, Large, Pretraining};

#[rustfmt::skip]
const STAGES: &[Stage] = &[
    stage("deit3-s16", S, 224, (0, 800.0, 2048), (4e-3, 0.05, 0.05), Pretraining),
    stage("deit3-b16", B, 192, (0, 800.0, 2048), (3e-3, 0.05, 0.2), Pretraining),
    stage("deit3-l16", L, 192, (0, 800.0, 2048), (3e-3, 0.05, 0.45), Pretraining),
    stage("deit3-h14", H, 160, (0, 800.0, 2048), (3e-3, 0.05, 0.6), Pretraining),
    stage("deit3-h52-14", (1280, 52, 14), 160, (0, 800.0, 2048), (3e-3, 0.05, 0.6), Pretraining),
    stage("deit3-b16-ft224", B, 224, (0, 20.0, 512), (1e-5, 0.1, 0.2), HigherResolution),
    stage("deit3-l16-ft224", L, 224, (0, 20.0, 512), (1e-5, 0.1, 0.45), HigherResolution),
    stage("deit3-h14-ft224", H, 224, (0, 20.0, 512), (1e-5, 0.1, 0.55), HigherResolution),
    stage("deit3-s16-ft384", S, 384, (0, 20.0, 512), (1e-5, 0.1, 0.0), HigherResolution),
    stage("deit3-b16-ft384", B, 384, (0, 20.0, 512), (1e-5, 0.1, 0.15), HigherResolution),
    stage("deit3-l16-ft384", L, 384, (0, 20.0, 512), (1e-5, 0.1, 0.4), HigherResolution),
    stage("deit3-s16-21k", S, 224, (1, 240.0, 2048), (1e-3, 0.02, 0.05), Large),
    stage("deit3-b16-21k", B, 224, (1, 240.0, 2048), (1e-3, 0.02, 0.1), Large),
    stage("deit3-l16-21k", L, 224, (1, 240.0, 2048), (1e-3, 0.02, 0.3), Large),
    stage("deit3-h14-21k", H, 128, (1, 90.0, 2048), (1e-3, 0.02, 0.5), Large),
    stage("deit3-s16-21k-ft", S, 224, (0, 50.0, 2048), (3e-4, 0.02, 0.05), Large),
    stage("deit3-b16-21k-ft", B, 224, (0, 50.0, 2048), (3e-4, 0.02, 0.15), Large),
    stage("deit3-l16-21k-ft", L, 224, (0, 50.0, 2048), (3e-4, 0.02, 0.4), Large),
    stage("deit3-h14-21k-ft", H, 224, (0, 50.0, 2048), (3e-4, 0.02, 0.45), Large),
];

const S: (usize, usize, usize) = (384, 12, 16);
const B: (usize, usize, usize) = (768, 12, 16);
const L: (usize, usize, usize) = (1024, 24, 16);
const H: (usize, usize, usize) = (1280, 32, 14);

const fn stage(
    name: &'static str,
    model: (usize, usize, usize),
    resolution: usize,
    (set, epochs, batch): (usize, f64, usize),
    (lr, weight_decay, drop_path): (f64, f64, f64),
    kind: Kind,
) -> Stage {
    Stage { name, model, resolution, set, epochs, batch, lr, weight_decay, drop_path, kind }
}

fn check(stage: &Stage, recipe: &Recipe) {
    let name = stage.name;
    let (model, train, augment) = (&recipe.model, &recipe.train, &recipe.augment);
    let dims = model.dimensions().unwrap();
    assert_eq!((dims.width, dims.depth, model.patch), stage.model, "{name}");
    assert_eq!(
        (recipe.resolution.min, recipe.resolution.max),
        (stage.resolution, stage.resolution),
        "{name}"
    );
    assert_eq!(
        (train.lr, train.weight_decay, model.drop_path),
        (stage.lr, stage.weight_decay, stage.drop_path),
        "{name}"
    );
    assert_eq!((model.layer_scale, recipe.eval.crop, recipe.mix.cutmix), (1e-4, 1.0, 1.0), "{name}");
    // Every batch is full, and holds its images exactly, as does the position table.
    let side = stage.resolution / model.patch;
    assert_eq!((model.position.rows, model.position.columns), (side, side), "{name}");
    assert_eq!(recipe.packing.images * train.accumulate, stage.batch, "{name}");
    let tokens = recipe.packing.images * (side * side + 1);
    assert_eq!(tokens.next_multiple_of(128), recipe.packing.tokens, "{name}");
    let epoch = SETS[stage.set] / stage.batch as f64;
    assert!((train.steps as f64 / epoch / stage.epochs - 1.0).abs() < 1e-3, "{name}: {}", train.steps);
    assert!((train.warmup as f64 / epoch / 5.0 - 1.0).abs() < 1e-3, "{name}: {}", train.warmup);

    let fine = stage.kind == HigherResolution;
    assert_eq!(train.optimizer == OptimizerKind::AdamW, fine, "{name}");
    assert_eq!(augment.three_augment, !fine, "{name}");
    assert_eq!(augment.color_jitter, if fine { 0.0 } else { 0.3 }, "{name}");
    assert_eq!(augment.rand_augment, if fine { "rand-m9-mstd0.5-inc1" } else { "" }, "{name}");
    let pretraining = stage.kind == Pretraining;
    assert_eq!(recipe.mix.binarise, pretraining, "{name}");
    assert_eq!(train.loss, if pretraining { LossKind::Bce } else { LossKind::Softmax }, "{name}");
    assert_eq!(train.label_smoothing, if pretraining { 0.0 } else { 0.1 }, "{name}");
    assert_eq!(augment.repeats, if pretraining { 3 } else { 1 }, "{name}");
    let large = stage.kind == Large;
    assert_eq!(augment.crop, if large { CropKind::Simple } else { CropKind::RandomResized }, "{name}");
    assert_eq!(recipe.mix.mixup, if large { 0.0 } else { 0.8 }, "{name}");
    assert_eq!((train.eps, train.clip), (1e-8, if fine { 0.0 } else { 1.0 }), "{name}");
}

#[test]
fn stages_are_those_of_the_repository() {
    for stage in STAGES {
        check(stage, &load(stage.name, &[]).unwrap());
    }
    let known = trencadis::recipe::load::list();
    let deit = known.iter().filter(|(name, _)| name.starts_with("deit3-")).count();
    assert_eq!(deit, STAGES.len() + 1, "every stage stands above, beside the transfer");
}

#[test]
fn a_transfer_is_what_the_authors_gave_for_cifar_10_and_the_defaults_of_their_code() {
    let recipe = load("deit3-b16-transfer", &[]).unwrap();
    let (train, batch) = (&recipe.train, recipe.packing.images * recipe.train.accumulate);
    assert_eq!((batch, recipe.resolution.max), (768, 224));
    assert_eq!((train.optimizer, train.nesterov, train.beta1), (OptimizerKind::Sgd, true, 0.9));
    assert_eq!((train.lr, train.weight_decay, train.clip), (1e-2, 1e-4, 0.0));
    assert_eq!((recipe.model.drop_path, train.label_smoothing), (0.0, 0.1));
    assert_eq!((recipe.mix.mixup, recipe.mix.cutmix, recipe.mix.binarise), (0.8, 1.0, false));
    assert_eq!((recipe.augment.repeats, recipe.augment.rand_augment.as_str()), (3, "rand-m9-mstd0.5-inc1"));
    let epoch = 50_000.0 / batch as f64;
    assert!(
        (train.steps as f64 / epoch - 1000.0).abs() < 0.1 && (train.warmup as f64 / epoch - 5.0).abs() < 0.1
    );
}
