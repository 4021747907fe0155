//! Shapes and random inputs of the benchmarks; each benchmark uses a part of them.

#![allow(dead_code)]

pub mod attention;
pub mod collective;
pub mod contrastive;
pub mod elementwise;
pub mod gemm;
pub mod gpu;
pub mod loss;
pub mod norm;
pub mod optim;
pub mod patch;
pub mod pool;
pub mod position;
pub mod residual;
pub mod shapes;
pub mod step;
pub mod view;

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

/// `cu_seqlens` of NaViT's mix of image sizes up to [`TOKENS`] tokens.
pub fn ragged() -> Vec<i32> {
    shapes::Images::mix(64.0, 256.0, TOKENS).cu_seqlens()
}
