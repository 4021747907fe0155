//! Random inputs and comparison, shared by the tests of the CPU ops.

use trencadis::cpu::real::Real;

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
