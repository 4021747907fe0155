//! Residual branch with LayerScale and stochastic depth, on the CPU device and on a GPU.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use trencadis::cpu::residual;

mod common;
use common::{TOKENS, WIDTHS, random};

/// Rows of many batches: more than the cache holds.
const ROWS: usize = 8 * TOKENS;

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("residual");
    for width in WIDTHS {
        let n = ROWS * width;
        let (mut out, branch, gamma, keep) = (random(n), random(n), random(width), random(ROWS));
        let (mut dbranch, mut dgamma) = (vec![0f32; n], vec![0f32; width]);
        let shape = format!("{ROWS}x{width}");
        group.throughput(Throughput::Bytes(12 * n as u64));
        group.bench_function(BenchmarkId::new("forward", &shape), |b| {
            b.iter(|| residual::forward(black_box(&mut out), &branch, Some(&gamma), Some(&keep), width));
        });
        group.bench_function(BenchmarkId::new("backward", &shape), |b| {
            b.iter(|| {
                let dgamma = Some(&mut dgamma[..]);
                let dbranch = black_box(&mut dbranch);
                residual::backward(dbranch, dgamma, &out, &branch, Some(&gamma), Some(&keep), width);
            });
        });
    }
}

fn residual_gpu(c: &mut Criterion) {
    common::gpu::family(c, "residual", common::residual::cases);
}

criterion_group!(group, benches, residual_gpu);
criterion_main!(group);
