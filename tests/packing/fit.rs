//! Images fitted to the gaps of closing bins and batches.

use super::*;
use trencadis::data::packing::PlannedImage;

/// An image of `settings`, by its own turn.
fn planned(settings: &PackingSettings, sample: u64) -> PlannedImage {
    let size = Synthetic::new(4000, 0.5, 2.0).size(sample as usize).unwrap();
    settings.plan(Draw { epoch: 0, sample, seen: sample }, size)
}

fn fitting(fit: FitKind, drop: DropKind) -> Recipe {
    let mut recipe = paper();
    (recipe.packing.fit, recipe.drop.kind) = (fit, drop);
    recipe
}

/// Against every whole resolution from 64 to 256, planned by itself.
#[test]
fn the_resolution_that_fills_the_gap_best_is_found() {
    for drop in [DropKind::None, DropKind::Beta] {
        let recipe = fitting(FitKind::Resolution, drop);
        let settings = PackingSettings::train(&recipe).unwrap();
        let mut fixed = settings.clone();
        (fixed.resolution.kind, fixed.packing.fit) = (ResolutionKind::Fixed, FitKind::None);
        let mut filled = 0;
        for sample in 0..60 {
            let image = planned(&settings, sample);
            let tokens: Vec<usize> = (64..=256)
                .map(|resolution| {
                    fixed.resolution.max = resolution;
                    fixed.plan(image.draw(), image.size).tokens
                })
                .collect();
            assert_eq!(Some(&settings.fewest(&image)), tokens.iter().min(), "{sample}");
            for gap in [1, 3, 8, 15, 16, 20, 47, 100, 200, 256] {
                let best = tokens.iter().copied().filter(|&tokens| tokens <= gap).max();
                let fitted = settings.fit(&image, gap);
                assert_eq!(fitted.is_some(), best.is_some(), "{sample} in {gap}");
                if let (Some(fitted), Some(best)) = (fitted, best) {
                    // Between two whole resolutions there may be a better one.
                    assert!((best..=gap).contains(&fitted.tokens), "{sample} in {gap}: {fitted:?}, {best}");
                    assert!(fitted.fitted && fitted.draw() == image.draw() && fitted.size == image.size);
                    // Loading finds as many as planning counted.
                    assert_eq!(settings.kept(&fitted).len(), fitted.kept);
                    filled += 1;
                }
            }
        }
        assert!(filled > 250, "{filled}");
    }
}

/// Of resolutions that fill it alike, the drawn one.
#[test]
fn an_image_that_fills_the_gap_stays_as_it_was_drawn() {
    let settings = PackingSettings::train(&fitting(FitKind::Resolution, DropKind::None)).unwrap();
    for sample in 0..200 {
        let image = planned(&settings, sample);
        let fitted = settings.fit(&image, image.tokens).unwrap();
        assert_eq!(fitted, PlannedImage { fitted: true, ..image });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_drop_rate_fills_the_gap_exactly_or_not_at_all(
        sample in 0u64..4000, gap in 0usize..300, registers in 0usize..3, max in 0.1f64..0.95,
    ) {
        let mut recipe = fitting(FitKind::Drop, DropKind::Constant);
        (recipe.model.registers, recipe.drop.max, recipe.drop.mean) = (registers, max, 0.0);
        (recipe.packing.tokens, recipe.packing.sequence) = (5120, 512);
        let settings = PackingSettings::train(&recipe).unwrap();
        let image = planned(&settings, sample);
        let patches = image.target.grid.patches();
        let fitted = settings.fit(&image, gap);
        prop_assert_eq!(fitted.is_some(), (settings.fewest(&image)..=patches + registers).contains(&gap));
        if let Some(fitted) = fitted {
            prop_assert_eq!(fitted.tokens, gap);
            let rate = 1.0 - fitted.kept as f64 / patches as f64;
            prop_assert!((0.0..=max + 1e-9).contains(&rate), "{rate}");
            prop_assert_eq!(fitted.target, image.target);
            let kept = settings.kept(&fitted);
            prop_assert_eq!(kept.len() + registers, gap);
            prop_assert!(kept.windows(2).all(|pair| pair[0] < pair[1]) && (kept[kept.len() - 1] as usize) < patches);
        } else if gap > registers && gap - registers <= patches {
            let rate = 1.0 - (gap - registers) as f64 / patches as f64;
            prop_assert!(rate > max - 1e-6, "a rate of {rate} could have been had");
        }
    }

    /// However images are fitted, none waits for ever: what heads the window is placed before anything else, and
    /// bins leave by age.
    #[test]
    fn no_image_waits_without_end(mut recipe in recipes(), fit in prop_oneof![Just(FitKind::Resolution), Just(FitKind::Drop)]) {
        if recipe.resolution.kind == ResolutionKind::Fixed || recipe.resolution.min == recipe.resolution.max {
            recipe.resolution.kind = ResolutionKind::Fixed;
            recipe.drop.kind = DropKind::Constant;
        } else if recipe.drop.kind == DropKind::None {
            recipe.drop.kind = DropKind::Beta;
        }
        recipe.packing.fit = if recipe.resolution.kind == ResolutionKind::Fixed { FitKind::Drop } else { fit };
        let settings = PackingSettings::train(&recipe).unwrap();
        let batch = recipe.packing.tokens / settings.capacity();
        let open = if recipe.packing.kind == PackingKind::Bins { recipe.packing.open.max(batch) } else { 0 };
        let mut planner = Planner::new(Arc::new(Synthetic::new(500, 0.2, 5.0)), settings, None).unwrap();
        let mut first_waits: Option<(Draw, usize)> = None;
        for _ in 0..60 {
            planner.next_batch().unwrap();
            let state = planner.state();
            prop_assert!(state.window.len() <= recipe.packing.lookahead.max(1));
            // The oldest draw of all: every batch closes at least the oldest bin.
            let oldest = state.waiting().min_by_key(|draw| draw.seen).copied();
            first_waits = match (first_waits, oldest) {
                (Some((draw, batches)), Some(oldest)) if draw == oldest => Some((draw, batches + 1)),
                (_, oldest) => oldest.map(|draw| (draw, 0)),
            };
            if let Some((draw, batches)) = first_waits {
                prop_assert!(batches <= open + recipe.packing.lookahead + 1, "{draw:?} waits for {batches} batches");
            }
        }
    }
}

/// What fitting does to the paper's mix, as docs/data.md tells: padding, and how it skews sizes and drop rates.
#[test]
fn padding_of_the_papers_mix() {
    use FitKind as F;
    let mix = |open: usize, drop: DropKind, fit: FitKind| {
        let mut recipe = fitting(fit, drop);
        recipe.packing.open = open;
        if open == 1 {
            recipe.packing.tokens = 256;
        }
        let stats = figures(&recipe, &format!("{open} open, {drop:?}, fit {fit:?}"));
        let (patches, fitted) = (stats.patches as f64 / stats.images as f64, stats.fitted as f64);
        println!("  {patches:.1} patches an image");
        assert_eq!((stats.out_of_slots, fitted > 0.0), (0, fit != F::None), "{stats}");
        (stats.padding(), patches, stats.dropped())
    };
    // Without dropping most of what 256 open bins leave is too small for any image.
    let (padded, drawn, _) = mix(256, DropKind::None, F::None);
    let (padding, patches, _) = mix(256, DropKind::None, F::Resolution);
    assert!(padded > 0.02 && padding < 0.0175, "{padded} {padding}");
    assert!((110.0..114.0).contains(&drawn) && patches > 0.94 * drawn, "{drawn} {patches}");
    // One bin at a time: what pads a quarter without fitting.
    let (padded, ..) = mix(1, DropKind::None, F::None);
    let (padding, patches, _) = mix(1, DropKind::None, F::Resolution);
    assert!(padded > 0.2 && padding < 0.02, "{padded} {padding}");
    assert!(patches > 0.75 * drawn, "{patches}");

    let (padded, _, dropped) = mix(256, DropKind::Beta, F::None);
    let (by_resolution, patches, _) = mix(256, DropKind::Beta, F::Resolution);
    let (by_drop, unchanged, rate) = mix(256, DropKind::Beta, F::Drop);
    assert!(padded > 0.0025 && by_resolution < 0.0015 && by_drop < 0.002, "{by_resolution} {by_drop}");
    assert!(patches > 0.94 * drawn && (unchanged / drawn - 1.0).abs() < 0.02, "{patches} {unchanged}");
    assert!((rate - dropped).abs() < 0.01, "{rate} {dropped}");
    let (padded, ..) = mix(1, DropKind::Beta, F::None);
    let (by_resolution, ..) = mix(1, DropKind::Beta, F::Resolution);
    let (by_drop, ..) = mix(1, DropKind::Beta, F::Drop);
    assert!(padded > 0.15 && by_resolution < 0.002 && by_drop < 0.001, "{padded} {by_resolution} {by_drop}");
}

/// Budgets of 1024 tokens in order, with no look-ahead to speak of.
#[test]
fn flat_budgets_are_filled_by_fitting() {
    let flat = |fit: FitKind, drop: DropKind| {
        let mut recipe = fitting(fit, drop);
        (recipe.packing.kind, recipe.packing.tokens, recipe.packing.lookahead) = (PackingKind::Flat, 1024, 1);
        figures(&recipe, &format!("flat, look-ahead 1, {drop:?}, fit {fit:?}")).padding()
    };
    let (padded, padding) = (flat(FitKind::None, DropKind::None), flat(FitKind::Resolution, DropKind::None));
    assert!(padded > 0.03 && padding < 0.015, "{padded} {padding}");
    let (padded, padding) = (flat(FitKind::None, DropKind::Beta), flat(FitKind::Drop, DropKind::Beta));
    assert!(padded > 0.02 && padding < 0.01, "{padded} {padding}");
}
