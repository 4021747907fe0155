//! Mixup and CutMix against timm, losses on their targets against torch, and what the loader makes of them.

mod loader;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::Path;

use trencadis::cpu::loss;
use trencadis::data::batch::{Mixture, Targets};
use trencadis::data::mix::{How, Mix, region};
use trencadis::ops::{ClassificationLoss, LossKind};
use trencadis::weights::Weights;

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn goldens() -> Tensors {
    Weights::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mix/timm.safetensors")).unwrap().tensors
}

/// How timm was told to mix its images, and their size.
fn mixes(goldens: &Tensors) -> (Vec<Mix>, (usize, usize)) {
    let [_, _, height, width] = goldens["pixels"].0[..] else { unreachable!() };
    let (shares, cut, centres) = (&goldens["shares"].1, &goldens["cut"].1, &goldens["centres"].1);
    let mix = |image: usize| {
        let centre = (centres[2 * image] as usize, centres[2 * image + 1] as usize);
        let how = match cut[image] > 0.0 {
            true => How::Paste(region(shares[image], (height, width), centre)),
            false => How::Blend(shares[image]),
        };
        Mix { partner: (shares.len() - 1 - image) as u64, how }
    };
    ((0..shares.len()).map(mix).collect(), (height, width))
}

/// Targets as the loader makes them.
fn mixtures(goldens: &Tensors) -> Vec<Mixture> {
    let (mixes, size) = mixes(goldens);
    let label = |image: usize| goldens["labels"].1[image] as i32;
    let of = |(image, mix): (usize, &Mix)| {
        Mixture::new(label(image), label(mix.partner as usize), mix.share(size))
    };
    mixes.iter().enumerate().map(of).collect()
}

/// `[N, K]` as the losses read them.
fn soft(mixtures: &[Mixture], classes: usize, smoothing: f32) -> Vec<f32> {
    let row = |mixture: &Mixture| {
        let mut row = vec![smoothing / classes as f32; classes];
        let parts = mixture.classes.iter().zip(mixture.shares);
        parts.for_each(|(&class, share)| row[class as usize] += (1.0 - smoothing) * share);
        row
    };
    mixtures.iter().flat_map(row).collect()
}

#[track_caller]
fn near(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance, "{at}: {got} for {want}");
    }
}

#[test]
fn pixels_are_those_of_timm() {
    let goldens = goldens();
    let (mixes, (height, width)) = mixes(&goldens);
    let plane = height * width;
    // [C, H, W] there, [H, W, C] here.
    let image = |name: &str, image: usize| -> Vec<f32> {
        let planes = &goldens[name].1[image * 3 * plane..][..3 * plane];
        (0..3 * plane).map(|i| planes[i % 3 * plane + i / 3]).collect()
    };
    let bytes = |values: Vec<f32>| -> Vec<u8> { values.iter().map(|&x| x as u8).collect() };
    for (at, mix) in mixes.iter().enumerate() {
        let mut pixels = bytes(image("pixels", at));
        mix.apply(&mut pixels, &bytes(image("pixels", mix.partner as usize)), width, 3);
        let got: Vec<f32> = pixels.iter().map(|&x| f32::from(x)).collect();
        // Half of 1/255: what is pasted is exact, what is blended is rounded.
        let tolerance = if matches!(mix.how, How::Paste(_)) { 0.0 } else { 0.5001 };
        near(&got, &image("mixed", at), tolerance);
    }
}

#[test]
fn targets_are_those_of_timm() {
    let goldens = goldens();
    let classes = goldens["logits"].0[1];
    let mixtures = mixtures(&goldens);
    for smoothing in ["0.0", "0.1"] {
        let want = &goldens[&format!("targets {smoothing}")].1;
        near(&soft(&mixtures, classes, smoothing.parse().unwrap()), want, 1e-6);
    }
    let binarised: Vec<Mixture> = mixtures.iter().map(|mixture| mixture.binarised()).collect();
    assert_eq!(soft(&binarised, classes, 0.0), goldens["binarised"].1);
}

/// Loss and gradient of all images, each of weight 1, with the gradient times `scale`.
fn losses(
    kind: LossKind,
    goldens: &Tensors,
    targets: &Targets,
    smoothing: f64,
    scale: f64,
) -> (f32, Vec<f32>) {
    let (shape, logits) = &goldens["logits"];
    let (images, classes) = (shape[0], shape[1]);
    let (mut loss, mut gradient) = (vec![0.0; images], vec![0.0; logits.len()]);
    let of = ClassificationLoss { smoothing, ..kind.into() };
    loss::cross_entropy(of, &mut loss, &mut gradient, logits, targets, &vec![1.0; images], classes, scale);
    (loss.iter().sum(), gradient)
}

#[test]
fn losses_on_mixed_targets_are_those_of_torch() {
    let goldens = goldens();
    let images = goldens["logits"].0[0] as f32;
    let mixed = mixtures(&goldens);
    let binarised = Targets::Mixed(mixed.iter().map(|mixture| mixture.binarised()).collect());
    let scale = f64::from(1.0 / images);
    let (sum, gradient) = losses(LossKind::Bce, &goldens, &binarised, 0.0, scale);
    near(&[sum / images], &goldens["bce"].1, 1e-6);
    near(&gradient, &goldens["bce gradient"].1, 1e-7);

    // The loss smooths what is mixed: the same as mixing what is smooth.
    let (sum, gradient) = losses(LossKind::Softmax, &goldens, &Targets::Mixed(mixed), 0.1, scale);
    near(&[sum / images], &goldens["softmax"].1, 2e-6);
    near(&gradient, &goldens["softmax gradient"].1, 1e-7);
}
