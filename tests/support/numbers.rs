//! Random inputs and comparisons, shared by the tests of the operations.

use trencadis::cpu::real::Real;
use trencadis::kernels::tolerance::Tolerance;

/// `n` values, normally distributed, the same for the same seed.
pub fn random<R: Real>(n: usize, seed: u64) -> Vec<R> {
    use rand_distr::{Distribution, StandardNormal};
    let mut rng = rand_philox::Philox::from_u64_seed(seed);
    (0..n)
        .map(|_| {
            let x: f64 = StandardNormal.sample(&mut rng);
            R::of(x)
        })
        .collect()
}

/// Fails where |got − want| > tolerance · max(1, |want|).
#[track_caller]
pub fn close<R: Real>(got: &[R], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (got, &want)) in got.iter().zip(want).enumerate() {
        let error = (got.f64() - want).abs();
        assert!(error <= tolerance * want.abs().max(1.0), "element {i}: {got:?} instead of {want}");
    }
}

/// How far apart two vectors are, `1 − 2⟨x,y⟩/(⟨x,x⟩+⟨y,y⟩)`: 0 where they are equal.
pub fn distance(x: &[f64], y: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norms = dot(x, x) + dot(y, y);
    if norms == 0.0 { 0.0 } else { 1.0 - 2.0 * dot(x, y) / norms }
}

/// Fails where the [`distance`] is above the tolerance's metric, or the largest difference above its part of the
/// largest value.
#[track_caller]
pub fn alike(name: &str, got: &[f64], want: &[f64], Tolerance { metric, largest }: Tolerance) {
    assert_eq!(got.len(), want.len(), "{name}");
    let apart = distance(got, want);
    let scale = want.iter().fold(1e-30f64, |max, x| max.max(x.abs()));
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / scale;
    assert!(
        apart <= metric && worst <= largest,
        "{name}: distance {apart:.2e} (limit {metric:.0e}), largest difference {worst:.2e} of the largest \
         value (limit {largest:.0e})"
    );
}
