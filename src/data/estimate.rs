//! What a recipe lets expect of its images before any is seen: tokens, the shortest image, the number of them.

use crate::data::dropping::{self, DEVIATIONS, Standing};
use crate::data::resolution;
use crate::recipe::{AspectKind, DropKind, FitKind, Recipe, RemainderKind, ResolutionKind};

/// Steps of the midpoint rule over a run.
const POINTS: u32 = 256;

/// Patches of an image at `resolution` pixels, before rounding to a grid: its length.
pub fn length(recipe: &Recipe, resolution: f64) -> f64 {
    (resolution / recipe.model.patch.max(1) as f64).powi(2)
}

/// Where `length` lies between the shortest, a square of `resolution.min`, and the longest, one of `resolution.max`:
/// 0..1.
pub fn share_of_length(length: f64, shortest: f64, longest: f64) -> f64 {
    if longest > shortest { ((length - shortest) / (longest - shortest)).clamp(0.0, 1.0) } else { 0.0 }
}

/// Expected tokens of an image, prefix tokens included, whose drop rate is `rate` of the share of its length.
fn tokens(recipe: &Recipe, rate: impl Fn(f64) -> f64) -> f64 {
    let [shortest, longest] =
        [recipe.resolution.min, recipe.resolution.max].map(|side| length(recipe, side as f64));
    let kept = resolution::mean(&recipe.resolution, |resolution| {
        let patches = length(recipe, resolution);
        (1.0 - rate(share_of_length(patches, shortest, longest))) * patches
    });
    recipe.model.prefix() as f64 + kept.max(1.0)
}

/// Expected tokens of an image while most are dropped.
pub fn fewest_tokens(recipe: &Recipe) -> f64 {
    let drop = &recipe.drop;
    tokens(recipe, |length| match drop.kind {
        DropKind::Schedule => drop.max,
        _ => dropping::expected(drop, Standing { length, seen: 0.0 }),
    })
}

/// Images of a run, N of the schedules: `drop.images`, or as many as the token budgets of all its batches hold of the
/// expected length. The rate is a function of n/N, so that its mean over the run does not depend on N.
pub fn images(recipe: &Recipe) -> u64 {
    let (drop, train) = (&recipe.drop, &recipe.train);
    if drop.images > 0 {
        return drop.images;
    }
    let mean = (0..POINTS)
        .map(|i| {
            let seen = (f64::from(i) + 0.5) / f64::from(POINTS);
            tokens(recipe, |length| dropping::expected(drop, Standing { length, seen }))
        })
        .sum::<f64>()
        / f64::from(POINTS);
    let budget = train.steps as f64 * train.accumulate as f64 * recipe.packing.tokens as f64;
    (budget / mean).round().max(1.0) as u64
}

/// Tokens of the shortest image at the smallest resolution, prefix tokens included: a lower bound.
pub fn shortest(recipe: &Recipe) -> f64 {
    let sizes = &recipe.resolution;
    let smallest = if sizes.kind == ResolutionKind::Fixed { sizes.max } else { sizes.min };
    // Rounding r patches a side to round(r) loses at most a third of each side (r just below 1.5);
    // cutting the remainder off loses at most half (r just below 2).
    let lost = match (sizes.aspect, sizes.remainder) {
        (AspectKind::Square, RemainderKind::Round) => 1.0,
        (_, RemainderKind::Round) => 4.0 / 9.0,
        (_, RemainderKind::Drop) => 1.0 / 4.0,
    };
    let drop = &recipe.drop;
    let kept = |resolution: usize, rate: f64| {
        let rate = if recipe.packing.fit == FitKind::Drop { rate.max(drop.max) } else { rate };
        let grid = (length(recipe, resolution as f64) * lost).max(1.0);
        ((1.0 - rate) * grid).round().max(1.0)
    };
    let kept = match drop.kind {
        DropKind::None => kept(smallest, 0.0),
        DropKind::Constant => kept(smallest, drop.mean),
        DropKind::Beta | DropKind::Schedule => kept(smallest, drop.max),
        // What is kept is concave in the length, and so least at one of its ends.
        DropKind::Resolution => {
            let most = DEVIATIONS * drop.std;
            kept(smallest, drop.min + most).min(kept(sizes.max, drop.max + most))
        }
    };
    recipe.model.prefix() as f64 + kept
}
