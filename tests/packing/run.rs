//! Draws over a run: what recipes expect of it, and states.

use super::*;
use trencadis::data::estimate;

/// Slots and images a bin, where the rate follows the length: as many as `estimate` expects.
#[test]
fn what_is_expected_of_rates_by_resolution_comes_true() {
    let mut recipe = paper();
    recipe.drop.kind = DropKind::Resolution;
    (recipe.drop.min, recipe.drop.max) = (0.1, 0.9);
    let stats = figures(&recipe, "bins of 256, rates by resolution");
    assert_eq!(stats.out_of_slots, 0, "{stats}");
    let tokens = stats.live as f64 / stats.images as f64;
    assert!((tokens / estimate::fewest_tokens(&recipe) - 1.0).abs() < 0.02, "{tokens}");
}

/// A run on a schedule sees the images that its N is derived from, and the rate at its ends is that of the formula.
#[test]
fn a_run_sees_as_many_images_as_its_schedule_expects() {
    for timescale in [-0.1, 0.2] {
        let mut recipe = paper();
        (recipe.packing.kind, recipe.packing.tokens) = (PackingKind::Flat, 4096);
        (recipe.train.steps, recipe.train.accumulate) = (100, 2);
        recipe.drop.kind = DropKind::Schedule;
        (recipe.drop.min, recipe.drop.max, recipe.drop.timescale) = (0.2, 0.8, timescale);
        let settings = PackingSettings::train(&recipe).unwrap();
        let mut planner =
            Planner::new(Arc::new(Synthetic::new(3000, 0.5, 2.0)), settings.clone(), None).unwrap();
        let batches: Vec<_> = (0..200).map(|_| planner.next_batch().unwrap().unwrap()).collect();
        let images: usize = batches.iter().map(|plan| plan.images.len()).sum();
        let expected = settings.drop.images as f64;
        assert!((images as f64 / expected - 1.0).abs() < 0.03, "{images} images, {expected} expected");
        let ends = [0.0, 1.0].map(|seen: f64| 0.2 + 0.6 / (1.0 + (-(seen - 0.5) / timescale).exp()));
        for (plan, rate) in [&batches[0], &batches[199]].into_iter().zip(ends) {
            let dropped = PackingStats::of(plan, &settings).dropped();
            assert!((dropped - rate).abs() < 0.025, "{dropped} dropped, {rate} expected");
        }
        assert!(batches.iter().all(|plan| !plan.out_of_slots));
    }
}

/// Checkpoints from before there were schedules: draws of two numbers, and the window among the bins.
#[test]
fn states_of_earlier_checkpoints_are_read() {
    let mut recipe = paper();
    let source: Arc<dyn Source> = Arc::new(Synthetic::new(400, 0.5, 2.0));
    for kind in [PackingKind::Bins, PackingKind::Flat] {
        recipe.packing.kind = kind;
        (recipe.packing.tokens, recipe.packing.open) = (1024, 8);
        let settings = PackingSettings::train(&recipe).unwrap();
        let mut planner = Planner::new(source.clone(), settings.clone(), None).unwrap();
        for _ in 0..30 {
            planner.next_batch().unwrap();
        }
        let state = planner.state();
        let pair = |draw: &Draw| vec![draw.epoch, draw.sample];
        let mut pending: Vec<Vec<Vec<u64>>> =
            state.pending.iter().map(|bin| bin.iter().map(pair).collect()).collect();
        pending.push(state.window.iter().map(pair).collect());
        let earlier = serde_json::json!({
            "epoch": state.epoch, "cursor": state.cursor, "samples": 400, "fingerprint": state.fingerprint,
            "pending": pending,
        });
        let earlier: PlannerState = serde_json::from_value(earlier).unwrap();
        let mut resumed = Planner::new(source.clone(), settings, Some(&earlier)).unwrap();
        let images = |plan: BatchPlan| -> Vec<_> {
            plan.images
                .into_iter()
                .map(|image| (image.epoch, image.sample, image.target, image.kept))
                .collect()
        };
        for _ in 0..20 {
            let [expected, got] =
                [&mut planner, &mut resumed].map(|p| images(p.next_batch().unwrap().unwrap()));
            assert_eq!(expected, got, "{kind:?}");
        }
    }
    let broken = serde_json::json!({
        "epoch": 0, "cursor": 1, "samples": 400, "fingerprint": 0, "pending": [[[0]]]
    });
    let error = serde_json::from_value::<PlannerState>(broken).unwrap_err();
    assert!(error.to_string().contains("holds 1 numbers instead of 3"), "{error}");
}
