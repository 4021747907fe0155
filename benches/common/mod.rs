//! Shapes and random inputs of the benchmarks.

/// Tokens of a batch.
pub const TOKENS: usize = 4096;

/// Widths of ViT-Ti, ViT-S and ViT-B.
pub const WIDTHS: [usize; 3] = [192, 384, 768];

/// `n` normally distributed values: zeros would be a different workload.
pub fn random(n: usize) -> Vec<f32> {
    use rand_distr::{Distribution, StandardNormal};
    let mut rng = rand_philox::Philox::from_u64_seed(n as u64);
    (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
}

/// `cu_seqlens` of images whose side is uniform in 64..=256 pixels at patch 16 and whose aspect ratio
/// is log-uniform in 1:2..2:1 (NaViT), up to [`TOKENS`] tokens.
#[allow(dead_code)]
pub fn ragged() -> Vec<i32> {
    use trencadis::rng::{Purpose, Stream};
    let mut stream = Stream::new(3, 0, 0, Purpose::Resolution);
    let mut cu_seqlens = vec![0];
    loop {
        let side = (64.0 + 192.0 * stream.uniform()) / 16.0;
        let aspect = (2.0 * stream.uniform() - 1.0).exp2().sqrt();
        let patches = ((side * aspect).round() * (side / aspect).round()) as i32;
        let end = cu_seqlens[cu_seqlens.len() - 1] + patches;
        if end as usize > TOKENS {
            return cu_seqlens;
        }
        cu_seqlens.push(end);
    }
}
