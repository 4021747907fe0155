//! Token dropping: rates, counts, choice.

use proptest::prelude::*;
use trencadis::data::draw::Draw;
use trencadis::data::dropping::{Rate, Standing, TokenDrop, expected};
use trencadis::data::estimate;
use trencadis::data::packing::PackingSettings;
use trencadis::recipe::{DropConfig, DropKind, Recipe, ResolutionKind};

fn config(kind: DropKind, mean: f64, max: f64) -> DropConfig {
    DropConfig { kind, mean, max, ..DropConfig::default() }
}

/// NaViT's plots: d from 0.1 to 0.9 over R from 64 to 384.
fn by_resolution() -> Recipe {
    let mut recipe = Recipe::default();
    (recipe.model.patch, recipe.packing.tokens) = (16, 4096);
    recipe.resolution.kind = ResolutionKind::Uniform;
    (recipe.resolution.min, recipe.resolution.max) = (64, 384);
    (recipe.drop.kind, recipe.drop.min, recipe.drop.max) = (DropKind::Resolution, 0.1, 0.9);
    recipe
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn variance(values: &[f64]) -> f64 {
    let mean = mean(values);
    values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64
}

fn rates(config: &DropConfig, standing: Standing, samples: u64) -> Vec<f64> {
    (0..samples).map(|s| TokenDrop::new(config, 1, 0, s).rate(config, standing).0).collect()
}

#[test]
fn beta_has_the_papers_mean_and_variance() {
    for (mean_rate, max) in [(0.53, 0.9), (0.25, 0.4), (0.4, 0.7)] {
        let config = config(DropKind::Beta, mean_rate, max);
        let rates = rates(&config, Standing::default(), 40_000);
        let share = mean_rate / max;
        let spread = 0.3 * share * (1.0 - share) * max * max;
        assert!(rates.iter().all(|r| (0.0..=max).contains(r)));
        assert!((mean(&rates) - mean_rate).abs() < 0.005, "{}", mean(&rates));
        assert!((variance(&rates) / spread - 1.0).abs() < 0.03, "{} {spread}", variance(&rates));
    }
}

/// A normal cut at two deviations has 0.7737 of its variance.
#[test]
fn rates_by_resolution_lie_within_two_deviations_of_a_line() {
    let config = by_resolution().drop;
    for (length, line) in [(0.0, 0.1), (0.25, 0.3), (1.0, 0.9)] {
        let standing = Standing { length, seen: 0.0 };
        let rates = rates(&config, standing, 40_000);
        assert!((expected(&config, standing) - line).abs() < 1e-12);
        assert!(rates.iter().all(|rate| (rate - line).abs() <= 2.0 * 0.02 + 1e-12));
        assert!((mean(&rates) - line).abs() < 0.0005, "{}", mean(&rates));
        assert!((variance(&rates) / (0.02f64.powi(2) * 0.7737) - 1.0).abs() < 0.03, "{}", variance(&rates));
        let near = |bound: f64| rates.iter().any(|rate| (rate - bound).abs() < 0.0005);
        assert!(near(line - 0.04) && near(line + 0.04), "the whole range");
    }
}

/// s_min and s_max are the squares at `resolution.min` and `resolution.max`: (64/16)² = 16 and (384/16)² = 576 patches.
#[test]
fn rates_follow_the_length_of_the_sequence() {
    let recipe = by_resolution();
    let settings = PackingSettings::train(&recipe).unwrap();
    let mut resolutions = Vec::new();
    for sample in 0..4000 {
        // 1:1, so that every length is that of a square.
        let image = settings.plan(Draw { epoch: 0, sample, seen: sample }, (400, 400));
        let patches = image.target.grid.patches() as f64;
        // The grid is rounded, the length is not: half a patch a side.
        let line = |side: f64| 0.1 + 0.8 * ((side * side - 16.0) / 560.0).clamp(0.0, 1.0);
        let side = patches.sqrt();
        let rate = 1.0 - image.kept as f64 / patches;
        let slack = 0.04 + 0.5 / patches + 1e-9;
        let range = line(side - 0.5) - slack..=line(side + 0.5) + slack;
        assert!(range.contains(&rate), "{rate} of {patches} patches, {range:?}");
        resolutions.push(side);
    }
    assert!(resolutions.contains(&4.0) && resolutions.contains(&24.0));
}

/// n in images, not in shares: the formula of appendix A.5.
#[test]
fn a_schedule_is_the_papers_sigmoid_of_the_images_seen() {
    let mut recipe = Recipe::default();
    recipe.drop = DropConfig { kind: DropKind::Schedule, min: 0.2, max: 0.8, images: 30_000, ..recipe.drop };
    let all = 30_000.0;
    // Figure 15: slow and fast down, and up.
    for (midpoint, timescale) in [(0.5, -0.1), (2.0 / 3.0, -0.2), (0.5, 0.1)] {
        (recipe.drop.midpoint, recipe.drop.timescale) = (midpoint, timescale);
        let settings = PackingSettings::train(&recipe).unwrap();
        let mut previous = None;
        for n in [0u64, 7_500, 15_000, 22_500, 30_000, 90_000] {
            let sigmoid = 1.0 / (1.0 + (-(n as f64 - midpoint * all) / (timescale * all)).exp());
            let rho = 0.2 + 0.6 * sigmoid;
            let standing = Standing { length: 0.7, seen: n as f64 / all };
            assert!((expected(&recipe.drop, standing) - rho).abs() < 1e-12);
            let image = settings.plan(Draw { epoch: 3, sample: 5, seen: n }, (300, 200));
            assert_eq!(image.kept, Rate(rho).kept(image.target.grid.patches()), "{n}");
            assert!(previous.is_none_or(|last| (rho > last) == (timescale > 0.0)));
            previous = Some(rho);
        }
        if midpoint == 0.5 {
            let half = Standing { length: 0.0, seen: 0.5 };
            assert!((expected(&recipe.drop, half) - 0.5).abs() < 1e-12);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rates_of_any_valid_recipe_lie_in_range(
        kind in 0usize..5, low in 0.0f64..0.95, high in 0.0f64..0.95, midpoint in -2.0f64..2.0,
        timescale in prop_oneof![-1.0f64..-1e-6, 1e-6..1.0], length in 0.0f64..=1.0, seen in 0.0f64..3.0, sample: u64,
    ) {
        let mut recipe = by_resolution();
        let (min, max) = (low.min(high), low.max(high));
        let kinds =
            [DropKind::None, DropKind::Constant, DropKind::Beta, DropKind::Resolution, DropKind::Schedule];
        let drop = &mut recipe.drop;
        *drop = DropConfig { kind: kinds[kind], mean: min, min, max, midpoint, timescale, ..drop.clone() };
        let valid = recipe.validate();
        let drop = &recipe.drop;
        // What is refused is what reaches beyond 0..1, or a family without a spread.
        match drop.kind {
            DropKind::Resolution => prop_assert_eq!(valid.is_ok(), min >= 0.04 && max + 0.04 < 1.0),
            DropKind::Beta => prop_assert_eq!(valid.is_ok(), min > 0.0 && min < max),
            _ => prop_assert!(valid.is_ok(), "{valid:?}"),
        }
        if valid.is_ok() {
            let standing = Standing { length, seen };
            let Rate(rate) = TokenDrop::new(drop, 4, 0, sample).rate(drop, standing);
            let range = match drop.kind {
                DropKind::None => 0.0..=0.0,
                DropKind::Constant => min..=min,
                DropKind::Beta => 0.0..=max,
                DropKind::Resolution => {
                    let line = min + (max - min) * length;
                    line - 0.04 - 1e-12..=line + 0.04 + 1e-12
                }
                DropKind::Schedule => min..=max,
            };
            prop_assert!(range.contains(&rate) && (0.0..1.0).contains(&rate), "{rate} in {range:?}");
        }
    }
}

/// The rates of a run fall from `max` to `min`, and on the average of the run N images fill its budget.
#[test]
fn images_of_a_run_follow_from_its_budget() {
    let mut recipe = Recipe::default();
    (recipe.model.patch, recipe.packing.tokens) = (16, 1024);
    (recipe.resolution.min, recipe.resolution.max) = (64, 256);
    (recipe.train.steps, recipe.train.accumulate) = (300, 4);
    // Without dropping: E[R²] = (64² + 64·256 + 256²)/3 = 28672, 112 patches.
    let budget = 300.0 * 4.0 * 1024.0;
    assert_eq!(estimate::images(&recipe), (budget / 112.0f64).round() as u64);
    recipe.drop = DropConfig { kind: DropKind::Schedule, min: 0.2, max: 0.8, ..recipe.drop };
    // Symmetric about the middle of the run: one half on the average.
    assert_eq!(estimate::images(&recipe), (budget / 56.0f64).round() as u64);
    assert_eq!(PackingSettings::train(&recipe).unwrap().drop.images, estimate::images(&recipe));
    // A midpoint at the end leaves most of a falling schedule near `max`.
    recipe.drop.midpoint = 1.0;
    let late = estimate::images(&recipe) as f64;
    let mean: f64 =
        (0..10_000).map(|i| 0.2 + 0.6 / (1.0 + (10.0 * ((f64::from(i) + 0.5) / 1e4 - 1.0)).exp())).sum();
    assert!((late / (budget / (112.0 * (1.0 - mean / 1e4))) - 1.0).abs() < 1e-4, "{late}");
    recipe.drop.images = 77;
    assert_eq!(estimate::images(&recipe), 77);
}

#[test]
fn the_kept_share_is_rounded_and_at_least_one() {
    assert_eq!([1, 2, 3, 4, 100].map(|n| Rate(0.5).kept(n)), [1, 1, 2, 2, 50]);
    assert_eq!(Rate(0.99).kept(10), 1);
    assert_eq!(Rate(0.0).kept(17), 17);
    let none = TokenDrop::new(&config(DropKind::None, 0.5, 0.9), 0, 0, 0);
    assert_eq!(none.indices(5, 5), [0, 1, 2, 3, 4]);
}

#[test]
fn the_longest_image_is_exactly_the_longest() {
    for rate in rates(&config(DropKind::Beta, 0.53, 0.9), Standing::default(), 500).into_iter().map(Rate) {
        for limit in [1, 2, 7, 255] {
            let longest = rate.longest(limit);
            assert!(rate.kept(longest) <= limit);
            assert!(rate.kept(longest + 1) > limit, "{limit} of {longest} at {rate:?}");
        }
    }
}

#[test]
fn tokens_are_drawn_uniformly_without_replacement_in_raster_order() {
    let config = config(DropKind::Constant, 0.5, 0.9);
    let mut counts = [0u32; 12];
    for sample in 0..12_000 {
        let kept = TokenDrop::new(&config, 5, 1, sample).indices(12, 6);
        assert_eq!(kept.len(), 6);
        assert!(kept.windows(2).all(|pair| pair[0] < pair[1]));
        kept.iter().for_each(|&i| counts[i as usize] += 1);
    }
    // Six standard deviations of a binomial with p = 1/2.
    assert!(counts.iter().all(|&c| (f64::from(c) - 6000.0).abs() < 6.0 * 54.8), "{counts:?}");
}

#[test]
fn the_choice_depends_on_seed_epoch_and_sample_alone() {
    let config = config(DropKind::Beta, 0.5, 0.9);
    let kept = |seed, epoch, sample| TokenDrop::new(&config, seed, epoch, sample).indices(196, 98);
    assert_eq!(kept(1, 2, 3), kept(1, 2, 3));
    assert_ne!(kept(1, 2, 3), kept(2, 2, 3));
    assert_ne!(kept(1, 2, 3), kept(1, 3, 3));
    assert_ne!(kept(1, 2, 3), kept(1, 2, 4));
}
