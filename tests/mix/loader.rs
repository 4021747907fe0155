//! Mixed images in packed batches.

use std::collections::BTreeMap;
use std::sync::Arc;

use trencadis::data::batch::{Mixture, PackedBatch, Patches, Targets};
use trencadis::data::loader::{LoadedBatch, Loader, LoaderState, Share};
use trencadis::data::mix::{How, Mix};
use trencadis::data::source::Source;
use trencadis::recipe::{AspectKind, CropKind, DropKind, PackingKind, Recipe, ResolutionKind};

use crate::support::synthetic::{Synthetic, pixel};

const PATCH: usize = 8;
const DIM: usize = 3 * PATCH * PATCH;

fn recipe() -> Recipe {
    let mut recipe = Recipe::default();
    recipe.model.patch = PATCH;
    recipe.packing.tokens = 512;
    (recipe.resolution.min, recipe.resolution.max) = (16, 96);
    (recipe.drop.kind, recipe.drop.mean) = (DropKind::Constant, 0.25);
    recipe.data.workers = 1;
    (recipe.mix.mixup, recipe.mix.cutmix) = (0.8, 1.0);
    recipe
}

/// Every image at its own size, as it is.
fn plain(recipe: &mut Recipe) {
    recipe.drop.kind = DropKind::None;
    recipe.resolution.kind = ResolutionKind::Native;
    recipe.data.flip = false;
}

fn source(samples: usize) -> Arc<dyn Source> {
    Arc::new(Synthetic::new(samples, 0.4, 2.5))
}

fn pixels(batch: &PackedBatch) -> &[u8] {
    match &batch.patches {
        Patches::U8(values) => values,
        _ => panic!("the loader writes bytes"),
    }
}

fn mixtures(batch: &PackedBatch) -> &[Mixture] {
    match &batch.targets {
        Targets::Mixed(mixtures) => mixtures,
        other => panic!("the images are mixed, and their targets {other:?}"),
    }
}

/// Patches and target of each image by sample and epoch.
fn images(batches: &[LoadedBatch]) -> BTreeMap<(u64, u64), String> {
    let of = |batch: &PackedBatch, slot: usize| {
        let range = batch.range(slot);
        let patches = &pixels(batch)[range.start * DIM..range.end * DIM];
        let key = (batch.epochs[slot], batch.sample_ids[slot]);
        (key, format!("{:?} {:?} {patches:?}", batch.grids[slot], mixtures(batch)[slot]))
    };
    batches.iter().flat_map(|loaded| (0..loaded.batch.images).map(|slot| of(&loaded.batch, slot))).collect()
}

/// Those that both have are the same; how many these are.
#[track_caller]
fn agree(a: &BTreeMap<(u64, u64), String>, b: &BTreeMap<(u64, u64), String>) -> usize {
    let both = a.iter().filter_map(|(key, image)| Some((key, image, b.get(key)?)));
    both.inspect(|(key, a, b)| assert!(a == b, "{key:?} differs")).count()
}

fn load(recipe: &Recipe, batches: usize) -> Vec<LoadedBatch> {
    let mut loader = Loader::train(source(60), recipe, None).unwrap();
    (0..batches).map(|_| loader.next_batch().unwrap()).collect()
}

#[test]
fn pixels_and_targets_are_mixed_alike() {
    let mut recipe = recipe();
    plain(&mut recipe);
    recipe.packing.images = 24;
    // 12 patches: 16 x 48 pixels.
    let size = (16, 48);
    let source: Arc<dyn Source> = Arc::new(Synthetic::with_sizes(vec![size; 50]));
    let mut loader = Loader::train(source.clone(), &recipe, None).unwrap();
    let mut seen = [0; 3];
    for _ in 0..8 {
        let LoadedBatch { batch, unreadable, unmixed, .. } = loader.next_batch().unwrap();
        assert!(unreadable.is_empty() && unmixed.is_empty());
        for slot in 0..batch.images {
            let (epoch, sample) = (batch.epochs[slot], batch.sample_ids[slot]);
            let drawn = Mix::draw(&recipe.mix, recipe.train.seed, (epoch, sample), 50, size);
            let label = (sample % 10) as i32;
            let want = match &drawn {
                None => Mixture::one(label),
                Some(mix) => Mixture::new(label, (mix.partner % 10) as i32, mix.share(size)),
            };
            assert_eq!(mixtures(&batch)[slot], want);
            seen[drawn.as_ref().map_or(0, |mix| if matches!(mix.how, How::Blend(_)) { 1 } else { 2 })] += 1;
            let range = batch.range(slot);
            for (token, [row, col]) in range.clone().zip(&batch.positions[range]) {
                for (i, &got) in pixels(&batch)[token * DIM..][..DIM].iter().enumerate() {
                    let (y, x) = (
                        usize::from(*row) * PATCH + i / PATCH % PATCH,
                        usize::from(*col) * PATCH + i % PATCH,
                    );
                    let of = |sample: u64| f32::from(pixel(sample as usize, y, x, i / PATCH / PATCH));
                    let want = match &drawn {
                        None => of(sample),
                        Some(Mix { partner, how: How::Blend(share) }) => {
                            share * of(sample) + (1.0 - share) * of(*partner)
                        }
                        Some(Mix { partner, how: How::Paste(region) }) => {
                            let inside = region.rows.contains(&y) && region.cols.contains(&x);
                            of(if inside { *partner } else { sample })
                        }
                    };
                    assert!((f32::from(got) - want).abs() <= 0.5001, "{got} for {want}");
                }
            }
        }
        // Unused slots have no weight, whatever their target.
        assert!(batch.weights[batch.images..].iter().all(|&weight| weight == 0.0));
    }
    assert!(seen[1] > 40 && seen[2] > 40, "{seen:?}");
}

#[test]
fn what_an_image_is_mixed_with_depends_on_nothing_around_it() {
    let alone = images(&load(&recipe(), 12));
    let mut other = recipe();
    other.data.workers = 4;
    assert_eq!(agree(&alone, &images(&load(&other, 12))), alone.len(), "workers");

    let mut other = recipe();
    (other.packing.kind, other.packing.tokens) = (PackingKind::Bins, 1024);
    (other.packing.sequence, other.packing.open) = (512, 4);
    assert!(agree(&alone, &images(&load(&other, 8))) > 60, "packing");

    let mut shared = recipe();
    shared.train.accumulate = 4;
    let mut ranks = Vec::new();
    for part in 0..2 {
        let mut loader = Loader::train_share(source(60), &shared, None, Share { part, parts: 2 }).unwrap();
        ranks.extend((0..6).map(|_| loader.next_batch().unwrap()));
    }
    assert_eq!(agree(&alone, &images(&ranks)), alone.len(), "ranks");
}

/// Crops and augmentation of both images, each by its own keys, whatever their shapes and sizes.
#[test]
fn cropped_and_augmented_images_are_mixed_alike() {
    for (crop, aspect) in
        [(CropKind::RandomResized, AspectKind::Native), (CropKind::Simple, AspectKind::Square)]
    {
        let mut recipe = recipe();
        (recipe.augment.crop, recipe.resolution.aspect) = (crop, aspect);
        (recipe.augment.three_augment, recipe.augment.color_jitter) = (true, 0.3);
        recipe.augment.repeats = 2;
        recipe.data.max_unreadable = 0.0;
        let alone = images(&load(&recipe, 8));
        assert!(alone.len() > 60, "{crop:?}: {}", alone.len());
        let mut other = recipe.clone();
        (other.packing.tokens, other.data.workers) = (1024, 3);
        (other.packing.kind, other.packing.sequence, other.packing.open) = (PackingKind::Bins, 512, 4);
        assert!(agree(&alone, &images(&load(&other, 6))) > 40, "{crop:?}");
        recipe.mix.prob = f64::MIN_POSITIVE;
        let unmixed = images(&load(&recipe, 8));
        let changed = alone.iter().filter(|(key, image)| unmixed[*key] != **image).count();
        assert!(changed * 10 > alone.len() * 9, "{crop:?}: {changed} of {} are mixed", alone.len());
    }
}

#[test]
fn a_checkpoint_continues_with_the_same_mixtures() {
    let recipe = recipe();
    let mut loader = Loader::train(source(37), &recipe, None).unwrap();
    let mut state = LoaderState::default();
    for _ in 0..6 {
        state = loader.next_batch().unwrap().state_after;
    }
    let mut resumed = Loader::train(source(37), &recipe, Some(&state)).unwrap();
    for _ in 0..4 {
        let (next, resumed) = (loader.next_batch().unwrap(), resumed.next_batch().unwrap());
        assert_eq!(format!("{:?}", next.batch), format!("{:?}", resumed.batch));
    }
}

#[test]
fn an_image_without_its_partner_is_used_as_it_is() {
    let mut recipe = recipe();
    recipe.data.max_unreadable = 0.9;
    let load = |recipe: &Recipe, broken: bool| {
        let mut source = Synthetic::new(30, 0.4, 2.5);
        if broken {
            (source.bad_pixels, source.panicking) = (vec![3, 4], vec![11]);
        }
        let mut loader = Loader::train(Arc::new(source), recipe, None).unwrap();
        (0..6).map(|_| loader.next_batch().unwrap()).collect::<Vec<_>>()
    };
    let broken = |sample: u64| [3, 4, 11].contains(&sample);
    let (mixed, hurt) = (load(&recipe, false), load(&recipe, true));
    recipe.mix.prob = f64::MIN_POSITIVE;
    let unmixed = load(&recipe, false);
    let (mut alone, mut failures) = (0, 0);
    for ((mixed, hurt), plain) in mixed.iter().zip(&hurt).zip(&unmixed) {
        let batch = &hurt.batch;
        let mut failed = Vec::new();
        for slot in 0..batch.images {
            let (epoch, sample) = (batch.epochs[slot], batch.sample_ids[slot]);
            let range = batch.range(slot).start * DIM..batch.range(slot).end * DIM;
            // The partner does not depend on the size.
            let mix = Mix::draw(&recipe_of(&recipe).mix, recipe.train.seed, (epoch, sample), 30, (64, 64));
            let want = match mix {
                _ if broken(sample) => {
                    assert_eq!(batch.weights[slot], 0.0);
                    failed.push(sample);
                    continue;
                }
                Some(mix) if broken(mix.partner) && hurt.unmixed.contains(&slot) => {
                    alone += 1;
                    failed.push(mix.partner);
                    plain
                }
                _ => mixed,
            };
            assert_eq!(batch.weights[slot], 1.0);
            assert_eq!(pixels(batch)[range.clone()], pixels(&want.batch)[range]);
            assert_eq!(mixtures(batch)[slot], mixtures(&want.batch)[slot]);
        }
        let mut told: Vec<u64> = hurt.unreadable.iter().map(|(sample, _)| *sample).collect();
        told.sort_unstable();
        failed.sort_unstable();
        assert_eq!(told, failed, "each failure is told");
        failures += failed.len();
    }
    assert!(alone > 3 && failures > alone, "{alone} of {failures}");
}

/// The recipe with every image mixed.
fn recipe_of(recipe: &Recipe) -> Recipe {
    let mut recipe = recipe.clone();
    recipe.mix.prob = 1.0;
    recipe
}

#[test]
fn binarised_targets_count_in_full() {
    let mut recipe = recipe();
    recipe.train.loss = trencadis::recipe::LossKind::Bce;
    recipe.mix.binarise = true;
    let (mut both, mut one) = (0, 0);
    for loaded in load(&recipe, 6) {
        for mixture in &mixtures(&loaded.batch)[..loaded.batch.images] {
            match mixture.shares {
                [1.0, 1.0] => both += 1,
                [1.0, 0.0] | [0.0, 1.0] => one += 1,
                shares => panic!("{shares:?}"),
            }
            assert!(mixture.shares != [1.0, 1.0] || mixture.classes[0] != mixture.classes[1]);
        }
    }
    // A tenth of the partners is of the same class.
    assert!(both > 4 * one && one > 0, "{both} and {one}");
}

#[test]
fn evaluation_mixes_nothing() {
    let mut classes = 0;
    for loaded in Loader::eval(source(20), &recipe(), 0).unwrap() {
        let batch = loaded.unwrap().batch;
        let Targets::Classes(labels) = &batch.targets else { panic!("{:?}", batch.targets) };
        assert!((0..batch.images).all(|slot| labels[slot] == (batch.sample_ids[slot] % 10) as i32));
        classes += batch.images;
    }
    assert_eq!(classes, 20);
}
