//! Loading on several data ranks: together what one rank loads, and the same states to resume from.

use std::collections::BTreeMap;

use super::*;
use trencadis::data::loader::Share;
use trencadis::data::packing::PackingStats;

fn shared(accumulate: usize) -> Recipe {
    let mut recipe = recipe();
    recipe.train.accumulate = accumulate;
    recipe.data.flip = true;
    recipe
}

/// Pixels and label of every image by (epoch, sample).
fn images(batches: &[PackedBatch]) -> BTreeMap<(u64, u64), (Vec<u8>, i32)> {
    let mut all = BTreeMap::new();
    for batch in batches {
        for slot in 0..batch.images {
            let range = batch.range(slot);
            let rows = &pixels(batch)[range.start * batch.patch_dim..range.end * batch.patch_dim];
            let key = (batch.epochs[slot], batch.sample_ids[slot]);
            let twice = all.insert(key, (rows.to_vec(), classes(batch)[slot]));
            assert!(twice.is_none(), "{key:?} is there twice");
        }
    }
    all
}

/// What a step of all ranks loads: batches of all, state after it, packing.
type Step = (Vec<PackedBatch>, LoaderState, PackingStats);

fn steps(recipe: &Recipe, ranks: usize, state: Option<&LoaderState>, count: usize) -> Vec<Step> {
    let load = |part| Loader::train_share(source(60), recipe, state, Share { part, parts: ranks }).unwrap();
    let mut loaders: Vec<Loader> = (0..ranks).map(load).collect();
    let each = recipe.train.accumulate / ranks;
    let mut step = || {
        let (mut batches, mut last) = (Vec::new(), Vec::new());
        for loader in &mut loaders {
            let loaded: Vec<_> = (0..each).map(|_| loader.next_batch().unwrap()).collect();
            let mut stats = PackingStats::default();
            loaded.iter().for_each(|loaded| stats.add(&loaded.stats));
            last.push((loaded[each - 1].state_after.clone(), stats));
            batches.extend(loaded.into_iter().map(|loaded| loaded.batch));
        }
        assert!(last.windows(2).all(|pair| pair[0] == pair[1]), "all ranks know the same of the step");
        let (state, stats) = last.swap_remove(0);
        (batches, state, stats)
    };
    (0..count).map(|_| step()).collect()
}

#[test]
fn any_number_of_ranks_trains_on_the_same_images() {
    for kind in [PackingKind::Flat, PackingKind::Bins] {
        let mut recipe = shared(4);
        (recipe.packing.kind, recipe.packing.sequence, recipe.packing.open) = (kind, 256, 4);
        let one = steps(&recipe, 1, None, 4);
        for ranks in [2, 4] {
            for (whole, part) in one.iter().zip(steps(&recipe, ranks, None, 4)) {
                assert!(images(&whole.0) == images(&part.0), "{kind:?}, {ranks} ranks");
                assert_eq!((&whole.1, &whole.2), (&part.1, &part.2));
            }
        }
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let recipe = shared(4);
    let one = steps(&recipe, 1, None, 5);
    for (before, after) in [(4, 2), (2, 1), (1, 4)] {
        let state = steps(&recipe, before, None, 2).pop().unwrap().1;
        let rest = steps(&recipe, after, Some(&state), 3);
        for (whole, part) in one[2..].iter().zip(&rest) {
            assert!(images(&whole.0) == images(&part.0), "{before} ranks, then {after}");
        }
    }
}

#[test]
fn evaluation_gives_every_rank_the_same_number_of_batches() {
    let recipe = shared(1);
    let all = |parts: usize| -> Vec<Vec<LoadedBatch>> {
        let load = |part| Loader::eval_share(source(50), &recipe, 64, Share { part, parts }).unwrap();
        (0..parts).map(|part| load(part).map(Result::unwrap).collect()).collect()
    };
    let one = all(1).remove(0);
    let whole: Vec<PackedBatch> = one.iter().map(|loaded| loaded.batch.clone()).collect();
    assert!(!whole.len().is_multiple_of(3) && whole.len() > 4, "the last round of three is not full");
    for parts in [2, 3, whole.len() + 1] {
        let ranks = all(parts);
        let count = whole.len().div_ceil(parts);
        assert!(ranks.iter().all(|batches| batches.len() == count));
        let mut batches = Vec::new();
        for (part, loaded) in ranks.iter().enumerate() {
            let mut stats = PackingStats::default();
            for (round, loaded) in loaded.iter().enumerate() {
                let images = whole.get(round * parts + part).map_or(0, |batch| batch.images);
                assert_eq!(loaded.batch.images, images, "dealt in turn");
                stats.add(&loaded.stats);
                batches.push(loaded.batch.clone());
            }
            assert_eq!(stats.images, 50, "packing of all ranks");
        }
        assert!(images(&batches) == images(&whole));
    }
}

#[test]
fn an_unreadable_image_is_met_by_one_rank() {
    let mut recipe = shared(2);
    recipe.data.max_unreadable = 0.5;
    let source = || -> Arc<dyn Source> {
        let mut source = Synthetic::new(60, 0.4, 2.5);
        (source.bad_sizes, source.bad_pixels) = (vec![7, 30], vec![3]);
        Arc::new(source)
    };
    let mut found = Vec::new();
    for part in 0..2 {
        let mut loader = Loader::train_share(source(), &recipe, None, Share { part, parts: 2 }).unwrap();
        let mut drawn = 0;
        // The first epoch and no more.
        loop {
            let loaded = loader.next_batch().unwrap();
            if loaded.state_after.epoch > 0 {
                break;
            }
            drawn += loaded.batch.images;
            found.extend(loaded.unreadable.into_iter().map(|(sample, _)| sample));
        }
        assert!(drawn > 10);
    }
    found.sort_unstable();
    found.dedup_by(|a, b| {
        assert_ne!(a, b, "told by both ranks");
        a == b
    });
    assert!(!found.is_empty() && found.iter().all(|sample| [3, 7, 30].contains(sample)), "{found:?}");
}

#[test]
fn what_cannot_be_dealt_is_refused() {
    let share = Share { part: 1, parts: 2 };
    let refused = Loader::train_share(source(50), &shared(3), None, share).err().unwrap();
    assert!(refused.to_string().contains("--set train.accumulate=4"), "{refused}");
}
