//! What is drawn for an image, how often and how strong.

use std::collections::BTreeMap;
use std::sync::Arc;

use safetensors::SafeTensors;
use trencadis::data::augment::{AugmentSettings, Op};
use trencadis::data::draw::Draw;
use trencadis::data::loader::{Loader, LoaderState};
use trencadis::data::order::Order;
use trencadis::data::source::{Image, Source};
use trencadis::data::view::{ViewSettings, Viewer};
use trencadis::recipe::{CropKind, Recipe};

use super::support::synthetic::Synthetic;
use super::{goldens, moments, numbers};

fn draws(set: impl Fn(&mut Recipe), count: u64) -> Vec<Vec<Op>> {
    let mut recipe = Recipe::default();
    set(&mut recipe);
    recipe.validate().unwrap();
    let settings = AugmentSettings::new(&recipe);
    (0..count).map(|sample| settings.draw(3, sample % 7, sample)).collect()
}

#[test]
fn three_augment_always_applies_one_of_three() {
    let (mut counts, mut radii) = ([0; 3], Vec::new());
    for ops in draws(|recipe| recipe.augment.three_augment = true, 12_000) {
        match ops[..] {
            [Op::Grayscale] => counts[0] += 1,
            [Op::Solarize(128)] => counts[1] += 1,
            [Op::GaussianBlur(radius)] => {
                counts[2] += 1;
                radii.push(radius);
            }
            _ => panic!("{ops:?}"),
        }
    }
    // Of 12,000 draws with probability 1/3 the standard deviation is 52.
    assert!(counts.iter().all(|count| (3750..4250).contains(count)), "{counts:?}");
    let (mean, deviation) = moments(&radii);
    assert!(
        (mean - 1.05).abs() < 0.04 && (deviation - 1.9 / 12f64.sqrt()).abs() < 0.02,
        "{mean} {deviation}"
    );
    assert!(radii.iter().all(|radius| (0.1..=2.0).contains(radius)));
}

#[test]
fn colour_jitter_draws_three_factors_in_random_order() {
    let mut orders = BTreeMap::new();
    let mut factors: [Vec<f64>; 3] = Default::default();
    for ops in draws(|recipe| recipe.augment.color_jitter = 0.3, 12_000) {
        let mut order = Vec::new();
        for op in ops {
            let (kind, factor) = match op {
                Op::Brightness(factor) => (0, factor),
                Op::Contrast(factor) => (1, factor),
                Op::Saturation(factor) => (2, factor),
                _ => panic!("{op:?}"),
            };
            order.push(kind);
            factors[kind].push(factor);
            assert!((0.7..=1.3).contains(&factor));
        }
        *orders.entry(order).or_insert(0) += 1;
    }
    assert_eq!(orders.len(), 6);
    assert!(orders.values().all(|count| (1800..2200).contains(count)), "{orders:?}");
    for values in &factors {
        let (mean, deviation) = moments(values);
        assert!((mean - 1.0).abs() < 0.01 && (deviation - 0.6 / 12f64.sqrt()).abs() < 0.005);
    }
    let with_both =
        draws(|recipe| (recipe.augment.three_augment, recipe.augment.color_jitter) = (true, 0.3), 100);
    assert!(with_both.iter().all(|ops| ops.len() == 4 && matches!(ops[1..], [_, _, _])));
    assert!(
        with_both.iter().all(|ops| matches!(ops[0], Op::Grayscale | Op::Solarize(_) | Op::GaussianBlur(_)))
    );
}

/// Name, as timm's, and the argument that timm's operation gets.
fn named(op: Op) -> (&'static str, f64) {
    match op {
        Op::AutoContrast => ("AutoContrast", 0.0),
        Op::Equalize => ("Equalize", 0.0),
        Op::Invert => ("Invert", 0.0),
        Op::Rotate(degrees) => ("Rotate", degrees),
        Op::Posterize(bits) => ("PosterizeIncreasing", f64::from(bits)),
        Op::Solarize(threshold) => ("SolarizeIncreasing", f64::from(threshold)),
        Op::SolarizeAdd(add) => ("SolarizeAdd", f64::from(add)),
        Op::Saturation(factor) => ("ColorIncreasing", factor),
        Op::Contrast(factor) => ("ContrastIncreasing", factor),
        Op::Brightness(factor) => ("BrightnessIncreasing", factor),
        Op::Sharpness(factor) => ("SharpnessIncreasing", factor),
        Op::ShearX(factor) => ("ShearX", factor),
        Op::ShearY(factor) => ("ShearY", factor),
        Op::TranslateX(share) => ("TranslateXRel", share),
        Op::TranslateY(share) => ("TranslateYRel", share),
        Op::Grayscale | Op::GaussianBlur(_) => panic!("{op:?} is not of RandAugment"),
    }
}

#[test]
fn rand_augment_draws_as_timms_does() {
    let bytes = goldens();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for text in ["rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.8-inc1"] {
        let count = 60_000;
        let mut seen: BTreeMap<_, Vec<f64>> = BTreeMap::new();
        for op in draws(|recipe| recipe.augment.rand_augment = text.into(), count).into_iter().flatten() {
            let (name, argument) = named(op);
            seen.entry(name).or_default().push(argument);
        }
        let want = numbers(&tensors, &format!("rand/{text}"));
        assert_eq!(seen.len(), 15);
        for ((name, arguments), want) in seen.iter().zip(want.chunks(3)) {
            let share = arguments.len() as f64 / count as f64;
            let (mean, deviation) = moments(arguments);
            // Of some 4,000 arguments the mean is known to a 60th of the deviation.
            let close = (share - want[0]).abs() < 0.006
                && (mean - want[1]).abs() <= 0.09 * want[2]
                && (deviation - want[2]).abs() <= 0.06 * want[2];
            assert!(close, "{text}, {name}: {share} {mean} {deviation} for {want:?}");
        }
    }
}

#[test]
fn the_view_is_cropped_mirrored_and_then_augmented() {
    let mut recipe = Recipe::default();
    recipe.augment.crop = CropKind::RandomResized;
    (recipe.augment.three_augment, recipe.augment.color_jitter) = (true, 0.3);
    let source = Synthetic::with_sizes(vec![(90, 120); 40]);
    let settings = trencadis::data::packing::PackingSettings::train(&recipe).unwrap();
    let view = ViewSettings::train(&recipe);
    let plain = ViewSettings { augment: AugmentSettings::default(), ..view.clone() };
    let mut changed = 0;
    for sample in 0..40 {
        let planned = settings.plan(Draw { epoch: 2, sample, seen: 0 }, (90, 120));
        let got = Viewer::new(&source, view.clone()).view(&planned).unwrap();
        let mut want: Image = Viewer::new(&source, plain.clone()).view(&planned).unwrap();
        changed += usize::from(want != got);
        for op in view.augment.draw(recipe.train.seed, 2, sample) {
            op.apply(&mut want, view.augment.fill());
        }
        assert!(want == got, "{sample}");
        assert_eq!(view.augment.fill(), [124, 116, 104]);
    }
    assert_eq!(changed, 40);
}

#[test]
fn each_sample_comes_so_many_times_in_a_row() {
    let order = Order::new(10, Some(5), 4, 3);
    let once = Order::new(10, Some(5), 4, 1);
    let draws: Vec<_> = (0..10).map(|position| order.draw(position, 40 + position as u64)).collect();
    for (position, &Draw { epoch, sample, seen }) in draws.iter().enumerate() {
        assert_eq!(seen, 40 + position as u64);
        assert_eq!(sample, once.draw(position / 3, 0).sample);
        assert_eq!(epoch, 12 + position as u64 % 3);
    }
    assert_eq!(once.draw(0, 0).epoch, 4);
}

#[test]
fn repeated_augmentation_draws_as_many_images_and_resumes() {
    let mut recipe = Recipe::default();
    recipe.augment.crop = CropKind::RandomResized;
    recipe.augment.repeats = 3;
    recipe.model.patch = 8;
    recipe.packing.tokens = 512;
    (recipe.resolution.min, recipe.resolution.max) = (16, 64);
    recipe.packing.lookahead = 1;
    recipe.data.workers = 1;
    let source: Arc<dyn Source> = Arc::new(Synthetic::new(31, 0.4, 2.5));
    let mut loader = Loader::train(source.clone(), &recipe, None).unwrap();
    let mut drawn = Vec::new();
    let mut kept = Vec::new();
    while drawn.len() < 3 * 31 {
        let loaded = loader.next_batch().unwrap();
        let batch = &loaded.batch;
        drawn.extend((0..batch.images).map(|slot| (batch.epochs[slot], batch.sample_ids[slot])));
        kept.push(loaded);
    }
    for (epoch, draws) in drawn.chunks_exact(31).enumerate() {
        let mut samples: Vec<_> = draws.iter().map(|draw| draw.1).collect();
        samples.dedup();
        assert_eq!(samples.len(), 11, "31 draws of three each, the last one cut short");
        assert!(draws.iter().all(|draw| draw.0 / 3 == epoch as u64));
        let keys: std::collections::BTreeSet<_> = draws.iter().collect();
        assert_eq!(keys.len(), 31, "no key comes twice");
    }
    let middle = kept.len() / 2;
    let state: LoaderState = kept[middle - 1].state_after.clone();
    let mut resumed = Loader::train(source, &recipe, Some(&state)).unwrap();
    for loaded in &kept[middle..] {
        let again = resumed.next_batch().unwrap();
        assert_eq!(format!("{:?}", again.batch), format!("{:?}", loaded.batch));
        assert_eq!(again.state_after, loaded.state_after);
    }
}
