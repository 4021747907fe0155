//! Packing: the paper's figures, and what must hold for any recipe and any images.

mod balance;
mod fit;
mod run;
#[path = "../support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;
use support::synthetic::Synthetic;
use trencadis::data::draw::Draw;
use trencadis::data::order::Order;
use trencadis::data::packing::{BatchPlan, PackingSettings, PackingStats, slots};
use trencadis::data::planner::{Planner, PlannerState};
use trencadis::data::source::Source;
use trencadis::recipe::{
    DropKind, FitKind, PackingKind, PositionBasis, PositionCombination, PositionCoordinate, Recipe,
    ResolutionKind,
};

/// NaViT-B/16 on JFT: r ~ U(64, 256), patch 16, bins of 256.
fn paper() -> Recipe {
    let mut recipe = Recipe::default();
    recipe.model.patch = 16;
    recipe.resolution.kind = ResolutionKind::Uniform;
    (recipe.resolution.min, recipe.resolution.max) = (64, 256);
    recipe.packing.kind = PackingKind::Bins;
    (recipe.packing.tokens, recipe.packing.sequence, recipe.packing.open) = (16384, 256, 256);
    (recipe.drop.kind, recipe.drop.mean, recipe.drop.max) = (DropKind::Beta, 0.53, 0.9);
    recipe
}

fn figures(recipe: &Recipe, name: &str) -> PackingStats {
    let source = Arc::new(Synthetic::new(40_000, 0.5, 2.0));
    let settings = PackingSettings::train(recipe).unwrap();
    let mut planner = Planner::new(source, settings, None).unwrap();
    let mut stats = PackingStats::default();
    while stats.images < 60_000 {
        let plan = planner.next_batch().unwrap().unwrap();
        stats.add(&PackingStats::of(&plan, planner.settings()));
    }
    println!("{name}: {stats}, {} slots", slots(recipe));
    stats
}

#[test]
fn the_papers_figures_with_token_dropping() {
    let stats = figures(&paper(), "bins of 256, beta dropping");
    assert!(stats.padding() < 0.01, "{stats}");
    assert!((4.6..5.2).contains(&stats.images_per_sequence()), "{stats}");
    assert!((stats.dropped() - 0.53).abs() < 0.01, "{stats}");
    assert_eq!(stats.out_of_slots, 0, "{stats}");
}

#[test]
fn the_papers_figures_without_token_dropping() {
    let mut recipe = paper();
    recipe.drop.kind = DropKind::None;
    let stats = figures(&recipe, "bins of 256, no dropping");
    assert!(stats.padding() < 0.04, "{stats}");
    assert_eq!(stats.out_of_slots, 0, "{stats}");
}

#[test]
fn a_flat_budget_is_full() {
    let mut recipe = paper();
    recipe.packing.kind = PackingKind::Flat;
    let dropping = figures(&recipe, "flat, beta dropping");
    recipe.drop.kind = DropKind::None;
    let plain = figures(&recipe, "flat, no dropping");
    for stats in [dropping, plain] {
        assert!(stats.padding() < 0.003, "{stats}");
        assert_eq!(stats.out_of_slots, 0, "{stats}");
    }
}

fn recipes() -> impl Strategy<Value = Recipe> {
    let packing = (any::<bool>(), 1usize..6, 1usize..5, 1usize..9, 1usize..20, 0usize..40);
    let model = (1usize..20, any::<bool>(), 0usize..5);
    let drop = (0u8..5, 0.05f64..0.6);
    let kinds = (0u8..4, 0u8..3);
    (packing, model, drop, kinds, any::<u32>()).prop_map(|(packing, model, drop, (kind, fit), seed)| {
        let (flat, budget, split, open, lookahead, images) = packing;
        let mut recipe = Recipe::default();
        recipe.packing.kind = if flat { PackingKind::Flat } else { PackingKind::Bins };
        recipe.packing.tokens = 128 * budget;
        recipe.packing.sequence = 128 * budget / split.min(4).next_power_of_two();
        recipe.packing.open = open;
        recipe.packing.lookahead = lookahead;
        recipe.packing.images = images;
        (recipe.model.patch, recipe.model.class_token, recipe.model.registers) = model;
        recipe.drop.kind =
            [DropKind::None, DropKind::Constant, DropKind::Beta, DropKind::Resolution, DropKind::Schedule]
                [usize::from(drop.0)];
        (recipe.drop.mean, recipe.drop.min, recipe.drop.max) = (drop.1, drop.1, 0.7);
        (recipe.drop.images, recipe.drop.timescale) = (500, drop.1 - 0.3);
        recipe.packing.fit = [FitKind::None, FitKind::Resolution, FitKind::Drop][usize::from(fit)];
        recipe.resolution.kind = [
            ResolutionKind::Fixed,
            ResolutionKind::Uniform,
            ResolutionKind::TruncatedNormal,
            ResolutionKind::Native,
        ][usize::from(kind)];
        // A square at `max` has to fit; the others need not.
        let sequence = if flat { recipe.packing.tokens } else { recipe.packing.sequence };
        let side = (sequence - recipe.model.prefix()).isqrt() * recipe.model.patch;
        (recipe.resolution.min, recipe.resolution.max) = (side.min(8), side.min(128));
        recipe.train.seed = u64::from(seed);
        // What needs resolutions or rates to choose from gets none where there are none.
        if recipe.resolution.kind == ResolutionKind::Fixed || recipe.resolution.min == recipe.resolution.max {
            if recipe.drop.kind == DropKind::Resolution {
                recipe.drop.kind = DropKind::Constant;
            }
            if recipe.packing.fit == FitKind::Resolution {
                recipe.packing.fit = FitKind::None;
            }
        }
        if recipe.drop.kind == DropKind::None && recipe.packing.fit == FitKind::Drop {
            recipe.packing.fit = FitKind::None;
        }
        recipe
    })
}

/// What every plan must keep to.
fn check(plan: &BatchPlan, recipe: &Recipe, settings: &PackingSettings) {
    assert_eq!(plan.bins.iter().sum::<usize>(), plan.images.len());
    assert!(plan.images.len() <= slots(recipe));
    let capacity = settings.capacity();
    assert!(plan.bins.len() <= recipe.packing.tokens / capacity);
    let mut images = plan.images.iter();
    for &bin in &plan.bins {
        let tokens: usize = images.by_ref().take(bin).map(|image| image.tokens).sum();
        assert!(tokens <= capacity, "{tokens} tokens in a bin of {capacity}");
    }
    for image in &plan.images {
        assert_eq!(image.tokens, image.kept + settings.prefix);
        assert!(image.kept >= 1 && image.kept <= image.target.grid.patches());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_sample_once_an_epoch_and_nothing_over_budget(recipe in recipes(), samples in 1usize..400) {
        let source = Arc::new(Synthetic::new(samples, 0.2, 5.0));
        let settings = PackingSettings::train(&recipe).unwrap();
        let mut planner = Planner::new(source, settings.clone(), None).unwrap();
        let mut seen: HashMap<(u64, u64), usize> = HashMap::new();
        let mut turns = Vec::new();
        // Until everything that was drawn in the first two epochs has left bins and window.
        loop {
            let plan = planner.next_batch().unwrap().unwrap();
            check(&plan, &recipe, &settings);
            prop_assert!(!plan.images.is_empty());
            for image in &plan.images {
                *seen.entry((image.epoch, image.sample)).or_default() += 1;
                turns.push(image.draw());
            }
            let state = planner.state();
            if state.epoch >= 2 && state.waiting().all(|draw| draw.epoch >= 2) {
                break;
            }
        }
        prop_assert!(seen.values().all(|&times| times == 1));
        for epoch in 0..2 {
            prop_assert_eq!(seen.keys().filter(|key| key.0 == epoch).count(), samples);
        }
        // Each is told how many were drawn before it.
        for Draw { epoch, sample, seen } in turns {
            let position = seen.checked_sub(epoch * samples as u64).unwrap();
            let order = Order::new(samples, Some(settings.seed), epoch, 1);
            prop_assert_eq!(order.draw(position as usize, seen).sample, sample);
        }
    }

    #[test]
    fn a_state_continues_identically(recipe in recipes(), samples in 1usize..300, before in 0usize..30) {
        let source: Arc<dyn Source> = Arc::new(Synthetic::new(samples, 0.2, 5.0));
        let settings = PackingSettings::train(&recipe).unwrap();
        let mut planner = Planner::new(source.clone(), settings.clone(), None).unwrap();
        for _ in 0..before {
            planner.next_batch().unwrap();
        }
        let json = serde_json::to_string(&planner.state()).unwrap();
        let state: PlannerState = serde_json::from_str(&json).unwrap();
        let mut resumed = Planner::new(source, settings, Some(&state)).unwrap();
        for _ in 0..10 {
            prop_assert_eq!(planner.next_batch().unwrap(), resumed.next_batch().unwrap());
            prop_assert_eq!(planner.state(), resumed.state());
        }
    }

    #[test]
    fn evaluation_is_one_pass_in_order(recipe in recipes(), samples in 1usize..300) {
        let settings = PackingSettings::eval(&recipe, 64).unwrap();
        let mut planner =
            Planner::new(Arc::new(Synthetic::new(samples, 0.2, 5.0)), settings.clone(), None).unwrap();
        let mut seen = Vec::new();
        while let Some(plan) = planner.next_batch().unwrap() {
            prop_assert!(plan.images.iter().map(|i| i.tokens).sum::<usize>() <= recipe.packing.tokens);
            for image in &plan.images {
                prop_assert_eq!(image.kept, image.target.grid.patches());
                seen.push(image.sample);
            }
        }
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..samples as u64).collect::<Vec<_>>());
    }
}

#[test]
fn order_follows_the_seed_and_the_epoch() {
    let first = |seed: u64| {
        let mut recipe = paper();
        recipe.train.seed = seed;
        recipe.packing.kind = PackingKind::Flat;
        let settings = PackingSettings::train(&recipe).unwrap();
        let mut planner = Planner::new(Arc::new(Synthetic::new(64, 0.5, 2.0)), settings, None).unwrap();
        let plan = planner.next_batch().unwrap().unwrap();
        plan.images.iter().map(|i| (i.epoch, i.sample)).collect::<Vec<_>>()
    };
    assert_eq!(first(1), first(1));
    assert_ne!(first(1), first(2));
    let drawn = first(1);
    let epoch = |e: u64| drawn.iter().filter(move |i| i.0 == e).map(|i| i.1).collect::<Vec<_>>();
    assert_eq!(epoch(0).len(), 64);
    assert_ne!(epoch(0), epoch(1));
    assert_ne!(epoch(0), (0..64).collect::<Vec<_>>());
}

#[test]
fn no_image_waits_longer_than_the_look_ahead_allows() {
    let mut recipe = paper();
    recipe.packing.kind = PackingKind::Flat;
    recipe.packing.tokens = 384;
    recipe.drop.kind = DropKind::None;
    let settings = PackingSettings::train(&recipe).unwrap();
    let mut planner = Planner::new(Arc::new(Synthetic::new(2000, 0.5, 2.0)), settings, None).unwrap();
    let mut waiting: Vec<(u64, u64)> = Vec::new();
    for _ in 0..200 {
        let plan = planner.next_batch().unwrap().unwrap();
        let placed: Vec<_> = plan.images.iter().map(|i| (i.epoch, i.sample)).collect();
        // The longest-waiting image is always first in the next batch.
        if let Some(first) = waiting.first() {
            assert_eq!(first, &placed[0]);
        }
        waiting = planner.state().waiting().map(|draw| (draw.epoch, draw.sample)).collect();
        assert!(waiting.len() <= recipe.packing.lookahead);
    }
}

/// Bins by the book: the first with room takes the image, else a new one; when none may be opened,
/// the oldest ones make a batch.
#[test]
fn bins_are_filled_greedily_first_fit() {
    let mut recipe = paper();
    (recipe.packing.tokens, recipe.packing.sequence, recipe.packing.open) = (1024, 256, 6);
    (recipe.packing.images, recipe.drop.kind) = (1024, DropKind::None);
    let settings = PackingSettings::train(&recipe).unwrap();
    let source = Arc::new(Synthetic::new(500, 0.5, 2.0));
    let order = Order::new(500, Some(recipe.train.seed), 0, 1);
    let mut bins: Vec<(usize, Vec<u64>)> = Vec::new();
    let mut batches: Vec<Vec<Vec<u64>>> = Vec::new();
    for at in 0..500 {
        let draw = order.draw(at, at as u64);
        let tokens = settings.plan(draw, source.size(draw.sample as usize).unwrap()).tokens;
        if bins.iter().all(|bin| bin.0 + tokens > 256) {
            if bins.len() == 6 {
                batches.push(bins.drain(..4).map(|bin| bin.1).collect());
            }
            if bins.iter().all(|bin| bin.0 + tokens > 256) {
                bins.push((0, Vec::new()));
            }
        }
        let bin = bins.iter_mut().find(|bin| bin.0 + tokens <= 256).unwrap();
        bin.0 += tokens;
        bin.1.push(draw.sample);
    }
    assert!(batches.len() > 20, "{}", batches.len());
    let mut planner = Planner::new(source, settings, None).unwrap();
    for expected in batches {
        let plan = planner.next_batch().unwrap().unwrap();
        let mut images = plan.images.iter().map(|image| image.sample);
        let made: Vec<Vec<u64>> = plan.bins.iter().map(|&n| images.by_ref().take(n).collect()).collect();
        assert_eq!(made, expected);
    }
}

#[test]
fn an_absolute_table_bounds_the_grid() {
    let mut recipe = paper();
    let position = &mut recipe.model.position;
    (position.basis, position.coordinate) = (PositionBasis::Learned, PositionCoordinate::Absolute);
    (position.rows, position.columns) = (12, 9);
    let largest = |recipe: &Recipe| {
        let source = Arc::new(Synthetic::new(2000, 0.2, 5.0));
        let settings = PackingSettings::eval(recipe, 256).unwrap();
        let mut planner = Planner::new(source, settings, None).unwrap();
        let (mut rows, mut cols, mut patches) = (0, 0, 0);
        while let Some(plan) = planner.next_batch().unwrap() {
            for grid in plan.images.iter().map(|image| image.target.grid) {
                rows = rows.max(grid.rows);
                cols = cols.max(grid.cols);
                patches = patches.max(grid.patches());
            }
        }
        (rows, cols, patches)
    };
    recipe.model.position.combination = PositionCombination::Sum;
    let (rows, cols, _) = largest(&recipe);
    assert_eq!((rows, cols), (12, 9));
    recipe.model.position.combination = PositionCombination::Flat;
    let (rows, _, patches) = largest(&recipe);
    assert!(rows > 12 && patches == 108);
    recipe.model.position.combination = PositionCombination::Joint;
    recipe.model.position.coordinate = PositionCoordinate::Fractional;
    assert!(largest(&recipe).2 > 250);
}

#[test]
fn unreadable_headers_are_skipped_and_named() {
    let mut source = Synthetic::new(300, 0.5, 2.0);
    source.bad_sizes = vec![7, 8, 299];
    let settings = PackingSettings::eval(&paper(), 64).unwrap();
    let mut planner = Planner::new(Arc::new(source), settings, None).unwrap();
    let (mut images, mut skipped) = (0, Vec::new());
    while let Some(plan) = planner.next_batch().unwrap() {
        images += plan.images.len();
        skipped.extend(plan.skipped);
    }
    assert_eq!(images, 297);
    assert_eq!(skipped.len(), 3);
    assert!(skipped[0] == (7, "synthetic-7: broken header".into()), "{skipped:?}");

    let mut source = Synthetic::new(5, 0.5, 2.0);
    source.bad_sizes = (0..5).collect();
    let settings = PackingSettings::train(&paper()).unwrap();
    let error = Planner::new(Arc::new(source), settings, None).unwrap().next_batch().unwrap_err();
    assert!(error.to_string().contains("none of the 5 images"), "{error}");
}

#[test]
fn impossible_recipes_are_refused_by_key() {
    type Break = fn(&mut Recipe);
    let cases: [(&str, Break); 9] = [
        ("model.patch", |r| r.model.patch = 0),
        ("packing.tokens", |r| r.packing.tokens = 1000),
        ("packing.sequence", |r| r.packing.sequence = 300),
        ("packing.open", |r| r.packing.open = 0),
        ("packing.sequence", |r| r.model.registers = 256),
        ("resolution.min", |r| r.resolution.min = 512),
        ("resolution.mean", |r| {
            r.resolution.kind = ResolutionKind::TruncatedNormal;
            r.resolution.mean = 2.0;
        }),
        ("drop.mean", |r| r.drop.mean = 0.95),
        ("model.channels", |r| r.model.channels = 4),
    ];
    for (key, change) in cases {
        let mut recipe = paper();
        change(&mut recipe);
        let error = PackingSettings::train(&recipe).unwrap_err();
        assert!(error.to_string().contains(key), "{key}: {error}");
        assert_eq!(error.exit_code(), 2);
    }
    let source: Arc<dyn Source> = Arc::new(Synthetic::new(10, 0.5, 2.0));
    let settings = PackingSettings::train(&paper()).unwrap();
    let mut state = Planner::new(source.clone(), settings.clone(), None).unwrap().state();
    assert!(Planner::new(source.clone(), settings.clone(), Some(&state)).is_ok());
    state.fingerprint ^= 1;
    let error = Planner::new(source.clone(), settings.clone(), Some(&state)).err().unwrap();
    assert!(error.to_string().contains("other names or classes"), "{error}");
    let state = PlannerState { samples: 11, ..PlannerState::default() };
    let error = Planner::new(source, settings.clone(), Some(&state)).err().unwrap();
    assert!(error.to_string().contains("11 images"), "{error}");
    assert!(Planner::new(Arc::new(Synthetic::new(0, 0.5, 2.0)), settings, None).is_err());
}
