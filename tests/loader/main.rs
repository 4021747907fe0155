//! Loading: what lies in a batch, order, resuming, unreadable images, shutting down.

mod ranks;
#[path = "../support/mod.rs"]
mod support;
mod view;

use std::sync::Arc;

use support::synthetic::{Synthetic, pixel};
use trencadis::data::batch::{PREFIX, PackedBatch, Patches, Targets};
use trencadis::data::dropping::TokenDrop;
use trencadis::data::loader::{LoadedBatch, Loader, LoaderState};
use trencadis::data::packing::slots;
use trencadis::data::source::{Source, open_for_eval};
use trencadis::recipe::{DropKind, FitKind, PackingKind, Recipe, RemainderKind, ResolutionKind};

fn recipe() -> Recipe {
    let mut recipe = Recipe::default();
    recipe.model.patch = 8;
    recipe.model.class_token = true;
    recipe.model.registers = 2;
    recipe.packing.tokens = 512;
    (recipe.resolution.min, recipe.resolution.max) = (16, 96);
    (recipe.drop.kind, recipe.drop.mean) = (DropKind::Beta, 0.4);
    recipe.data.workers = 1;
    recipe
}

fn pixels(batch: &PackedBatch) -> &[u8] {
    match &batch.patches {
        Patches::U8(values) => values,
        _ => panic!("the loader writes bytes"),
    }
}

fn classes(batch: &PackedBatch) -> &[i32] {
    match &batch.targets {
        Targets::Classes(classes) => classes,
        Targets::Mixed(_) | Targets::Soft(_) => panic!("nothing is mixed"),
    }
}

fn same(a: &LoadedBatch, b: &LoadedBatch) -> bool {
    pixels(&a.batch) == pixels(&b.batch)
        && format!("{:?}", a.batch) == format!("{:?}", b.batch)
        && a.state_after == b.state_after
        && a.stats == b.stats
        && a.unreadable == b.unreadable
}

fn source(samples: usize) -> Arc<dyn Source> {
    Arc::new(Synthetic::new(samples, 0.4, 2.5))
}

#[test]
fn a_batch_has_the_layout_that_everything_else_expects() {
    let recipe = recipe();
    let mut loader = Loader::train(source(50), &recipe, None).unwrap();
    for _ in 0..5 {
        let LoadedBatch { batch, stats, .. } = loader.next_batch().unwrap();
        let (tokens, slots) = (512, slots(&recipe));
        assert_eq!((batch.tokens(), batch.slots(), batch.patch_dim), (tokens, slots, 192));
        assert_eq!(pixels(&batch).len(), tokens * 192);
        assert_eq!(batch.cu_seqlens.len(), slots + 1);
        assert_eq!(batch.cu_seqlens[0], 0);
        assert_eq!(batch.live_tokens() as u64, stats.live);
        for slot in 0..batch.images {
            let range = batch.range(slot);
            let [rows, cols] = batch.grids[slot];
            assert!(batch.positions[range.clone()][..3].iter().all(|&p| p == PREFIX));
            let kept = &batch.positions[range.clone()][3..];
            assert!(!kept.is_empty());
            assert!(kept.iter().all(|p| p[0] < rows && p[1] < cols));
            assert!(kept.windows(2).all(|pair| pair[0] < pair[1]), "raster order");
            assert!(pixels(&batch)[range.start * 192..][..3 * 192].iter().all(|&v| v == 0));
            assert_eq!(batch.weights[slot], 1.0);
            assert_eq!(classes(&batch)[slot], (batch.sample_ids[slot] % 10) as i32);
        }
        for slot in batch.images..slots {
            assert!(batch.range(slot).is_empty());
            assert_eq!((batch.weights[slot], batch.sample_ids[slot]), (0.0, 0));
        }
        assert!(batch.positions[batch.live_tokens()..].iter().all(|&p| p == [0, 0]));
        assert!(pixels(&batch)[batch.live_tokens() * 192..].iter().all(|&v| v == 0));
    }
}

/// Native sizes that are multiples of the patch need no resizing, so every byte is known.
#[test]
fn every_byte_of_an_unresized_image_lies_where_it_should() {
    let mut recipe = recipe();
    recipe.resolution.kind = ResolutionKind::Native;
    recipe.resolution.remainder = RemainderKind::Drop;
    recipe.packing.images = 16;
    let sizes = vec![(16, 24), (40, 8), (17, 30)];
    let source: Arc<dyn Source> = Arc::new(Synthetic::with_sizes(sizes.clone()));
    let batch = Loader::eval(source, &recipe, 96).unwrap().next().unwrap().unwrap().batch;
    assert_eq!(batch.images, 3);
    assert_eq!(batch.grids[..3], [[2, 3], [5, 1], [2, 3]]);
    for slot in 0..3 {
        for token in batch.range(slot).skip(3) {
            let [row, col] = batch.positions[token].map(usize::from);
            for (i, &value) in pixels(&batch)[token * 192..][..192].iter().enumerate() {
                let (channel, y, x) = (i / 64, i / 8 % 8, i % 8);
                assert_eq!(value, pixel(slot, row * 8 + y, col * 8 + x, channel));
            }
        }
    }
}

#[test]
fn the_bits_do_not_depend_on_the_workers() {
    let load = |workers: usize| {
        let mut recipe = recipe();
        recipe.data.workers = workers;
        let mut loader = Loader::train(source(40), &recipe, None).unwrap();
        (0..8).map(|_| loader.next_batch().unwrap()).collect::<Vec<_>>()
    };
    let one = load(1);
    for workers in [2, 5] {
        assert!(one.iter().zip(&load(workers)).all(|(a, b)| same(a, b)));
    }
}

#[test]
fn a_checkpoint_continues_with_the_next_batch() {
    for (drop, packing, fit) in [
        (DropKind::Beta, PackingKind::Flat, FitKind::None),
        (DropKind::Schedule, PackingKind::Flat, FitKind::Resolution),
        (DropKind::Schedule, PackingKind::Bins, FitKind::Drop),
        (DropKind::Resolution, PackingKind::Bins, FitKind::Resolution),
    ] {
        let mut recipe = recipe();
        (recipe.packing.kind, recipe.packing.sequence, recipe.packing.open) = (packing, 256, 6);
        // Over the 200 draws of these batches the rate falls from 0.9 to 0.1.
        (recipe.drop.kind, recipe.drop.images, recipe.packing.fit) = (drop, 200, fit);
        let mut loader = Loader::train(source(37), &recipe, None).unwrap();
        let mut state = LoaderState::default();
        for _ in 0..6 {
            state = loader.next_batch().unwrap().state_after;
        }
        let json = serde_json::to_string(&state).unwrap();
        let state = serde_json::from_str(&json).unwrap();
        let mut resumed = Loader::train(source(37), &recipe, Some(&state)).unwrap();
        for _ in 0..4 {
            let [expected, got] = [&mut loader, &mut resumed].map(|loader| loader.next_batch().unwrap());
            assert!(same(&expected, &got), "{drop:?}, {packing:?}, {fit:?}");
        }
    }
}

#[test]
fn evaluation_visits_every_image_once_and_ends() {
    let recipe = recipe();
    let mut ids = Vec::new();
    let mut loader = Loader::eval(source(101), &recipe, 0).unwrap();
    for loaded in &mut loader {
        let batch = loaded.unwrap().batch;
        assert!(batch.images > 0);
        ids.extend_from_slice(&batch.sample_ids[..batch.images]);
    }
    assert!(loader.next().is_none());
    ids.sort_unstable();
    assert_eq!(ids, (0..101).collect::<Vec<_>>());
    assert_eq!(loader.report().drawn, 101);
}

#[test]
fn flips_are_random_in_training_and_absent_in_evaluation() {
    let mut recipe = recipe();
    recipe.drop.kind = DropKind::None;
    recipe.resolution.kind = ResolutionKind::Native;
    recipe.packing.images = 16;
    let source: Arc<dyn Source> = Arc::new(Synthetic::with_sizes(vec![(8, 8); 64]));
    let mut flipped = 0;
    let mut loader = Loader::train(source, &recipe, None).unwrap();
    let mut images = 0;
    for _ in 0..12 {
        let batch = loader.next_batch().unwrap().batch;
        for slot in 0..batch.images {
            let first = pixels(&batch)[(batch.range(slot).start + 3) * 192];
            let sample = batch.sample_ids[slot] as usize;
            let mirrored = first == pixel(sample, 0, 7, 0);
            assert!(mirrored || first == pixel(sample, 0, 0, 0));
            flipped += usize::from(mirrored);
            images += 1;
        }
    }
    assert!(flipped > images / 4 && flipped < images * 3 / 4, "{flipped} of {images}");
}

#[test]
fn an_unreadable_image_keeps_its_slot_and_loses_its_weight() {
    let mut recipe = recipe();
    recipe.data.max_unreadable = 0.5;
    let mut broken = Synthetic::new(60, 0.4, 2.5);
    broken.bad_pixels = vec![3];
    broken.panicking = vec![11];
    broken.bad_sizes = vec![20];
    let mut loader = Loader::eval(Arc::new(broken), &recipe, 0).unwrap();
    let (mut images, mut silent) = (0, Vec::new());
    for loaded in &mut loader {
        let batch = loaded.unwrap().batch;
        images += batch.images;
        for slot in 0..batch.images {
            if batch.weights[slot] == 0.0 {
                let range = batch.range(slot);
                assert!(pixels(&batch)[range.start * 192..range.end * 192].iter().all(|&v| v == 0));
                assert!(!range.is_empty());
                silent.push(batch.sample_ids[slot]);
            }
        }
    }
    assert_eq!((images, silent), (59, vec![3, 11]));
    let report = loader.report();
    assert_eq!((report.drawn, report.unreadable), (60, 3));
    assert!(report.examples.iter().any(|e| e.starts_with("synthetic-20: broken header")));
    assert!(report.examples.iter().any(|e| e.starts_with("synthetic-3: broken pixels")));
}

#[test]
fn too_many_unreadable_images_stop_the_run() {
    let recipe = recipe();
    let mut broken = Synthetic::new(400, 0.4, 2.5);
    broken.bad_pixels = (0..400).step_by(10).collect();
    let mut loader = Loader::train(Arc::new(broken), &recipe, None).unwrap();
    let mut batches = 0;
    let error = loop {
        match loader.next_batch() {
            Ok(_) => batches += 1,
            Err(error) => break error,
        }
    };
    assert!(batches > 0, "not judged by the first image");
    let text = error.to_string();
    assert_eq!(error.exit_code(), 2);
    assert!(text.contains("data.max_unreadable = 0.01") && text.contains("synthetic-"), "{text}");

    // A set that breaks late is noticed within an epoch.
    let whole = Synthetic::new(400, 0.4, 2.5);
    let gone = whole.gone.clone();
    let mut loader = Loader::train(Arc::new(whole), &recipe, None).unwrap();
    for _ in 0..300 {
        loader.next_batch().unwrap();
    }
    gone.store(true, std::sync::atomic::Ordering::Relaxed);
    let drawn = (0..100).find_map(|_| loader.next_batch().err()).expect("noticed");
    assert!(drawn.to_string().contains("synthetic-"), "{drawn}");

    // A set below 100 images is judged after its first pass.
    let mut broken = Synthetic::new(9, 0.4, 2.5);
    broken.bad_pixels = vec![4];
    let last = Loader::eval(Arc::new(broken), &recipe, 16).unwrap().last().unwrap();
    assert!(last.is_err());
}

#[test]
fn an_unreadable_image_counts_once_however_often_it_is_drawn() {
    let mut recipe = recipe();
    recipe.data.max_unreadable = 0.5;
    let mut broken = Synthetic::new(20, 0.4, 2.5);
    (broken.bad_pixels, broken.bad_sizes) = (vec![4], vec![7]);
    let mut loader = Loader::train(Arc::new(broken), &recipe, None).unwrap();
    while loader.next_batch().unwrap().state_after.epoch < 5 {}
    let report = loader.report();
    assert_eq!((report.drawn, report.unreadable, report.examples.len()), (20, 2, 2));
    assert_eq!(report.share(), 0.1);
    assert_eq!(report.newest.as_ref(), report.examples.last());
}

/// Damaged files in a real folder: each is named once and costs only itself.
#[test]
fn damaged_files_in_a_folder_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let class = folder.path().join("val/cat");
    std::fs::create_dir_all(&class).unwrap();
    for i in 0..4 {
        image::GrayImage::from_pixel(40, 30, image::Luma([90])).save(class.join(format!("{i}.png"))).unwrap();
    }
    let whole = std::fs::read(class.join("0.png")).unwrap();
    std::fs::write(class.join("cut.png"), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(class.join("empty.webp"), "").unwrap();
    std::fs::write(class.join("text.jpg"), "no image").unwrap();
    let mut recipe = recipe();
    recipe.data.path = folder.path().display().to_string();
    let data = open_for_eval(&recipe.data, 3).unwrap();

    recipe.data.max_unreadable = 0.5;
    let mut loader = Loader::eval(data.validation.clone(), &recipe, 0).unwrap();
    let weights: f32 = (&mut loader).map(|loaded| loaded.unwrap().batch.weights.iter().sum::<f32>()).sum();
    assert_eq!(weights, 4.0);
    let report = loader.report();
    assert_eq!((report.drawn, report.unreadable), (7, 3));
    for file in ["cut.png", "empty.webp", "text.jpg"] {
        let named: Vec<_> = report.examples.iter().filter(|e| e.contains(file)).collect();
        assert_eq!(named.len(), 1, "{:?}", report.examples);
        assert_eq!(named[0].matches(file).count(), 1, "{named:?}");
    }

    // Nothing readable at all: the pass ends, each file is named, and none is an error by itself.
    for i in ["0", "1", "2", "3", "cut"] {
        std::fs::write(class.join(format!("{i}.png")), "").unwrap();
    }
    recipe.data.max_unreadable = 1.0;
    let mut loader = Loader::eval(data.validation, &recipe, 0).unwrap();
    let mut ids: Vec<u64> = (&mut loader).flat_map(|l| l.unwrap().unreadable).map(|(id, _)| id).collect();
    // A damaged header is found before damaged pixels.
    ids.sort_unstable();
    assert_eq!(ids, (0..7).collect::<Vec<_>>());
}

#[test]
fn dropping_a_loader_ends_its_threads() {
    let source = source(200);
    for taken in 0..3 {
        let mut recipe = recipe();
        recipe.data.workers = 3;
        let mut loader = Loader::train(source.clone(), &recipe, None).unwrap();
        for _ in 0..taken {
            loader.next_batch().unwrap();
        }
        drop(loader);
        // Threads hold the source; the drop has joined them.
        assert_eq!(Arc::strong_count(&source), 1);
    }
}

#[test]
fn kept_tokens_are_those_of_the_samples_own_stream() {
    let recipe = recipe();
    let mut loader = Loader::train(source(30), &recipe, None).unwrap();
    let batch = loader.next_batch().unwrap().batch;
    for slot in 0..batch.images {
        let [rows, cols] = batch.grids[slot].map(usize::from);
        let kept =
            TokenDrop::new(&recipe.drop, recipe.train.seed, batch.epochs[slot], batch.sample_ids[slot])
                .indices(rows * cols, batch.range(slot).len() - 3);
        let positions: Vec<_> =
            kept.iter().map(|&i| [(i as usize / cols) as u16, (i as usize % cols) as u16]).collect();
        assert_eq!(positions, batch.positions[batch.range(slot)][3..]);
    }
}

/// With many open bins most draws wait for later batches; they count all the same, and a few damaged
/// files that come early do not end a run whose set is sound.
#[test]
fn a_few_damaged_files_do_not_stop_a_run() {
    let mut recipe = recipe();
    recipe.packing.kind = PackingKind::Bins;
    (recipe.packing.sequence, recipe.packing.open) = (256, 64);
    for seed in 0..4 {
        recipe.train.seed = seed;
        let mut source = Synthetic::new(2000, 0.4, 2.5);
        // Half of what data.max_unreadable allows.
        source.bad_sizes = (0..2000).step_by(200).collect();
        let mut loader = Loader::train(Arc::new(source), &recipe, None).unwrap();
        for _ in 0..60 {
            loader.next_batch().unwrap();
        }
        assert!(loader.report().unreadable > 0);
    }
}
