//! Sums of ranks that share a GPU.

use criterion::{Criterion, criterion_group, criterion_main};

mod common;

fn collective_gpu(c: &mut Criterion) {
    common::gpu::family(c, "collective", common::collective::cases);
}

criterion_group!(benches, collective_gpu);
criterion_main!(benches);
