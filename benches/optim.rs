//! Optimiser over the parameters of Vision Transformers, on the CPU device and on a GPU.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use trencadis::cpu::optim::{self, AdamW};

mod common;
use common::{WIDTHS, random};

fn benches(c: &mut Criterion) {
    let config = AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.05,
        step: 10,
        grad_scale: 1.0,
    };
    let mut group = c.benchmark_group("optim");
    for width in WIDTHS {
        // Twelve blocks of 12 D² weights.
        let n = 144 * width * width;
        let (mut p, grad) = (random(n), random(n));
        let (mut m, mut v) = (vec![0f32; n], vec![0f32; n]);
        group.throughput(Throughput::Bytes(28 * n as u64));
        group.bench_function(BenchmarkId::new("adamw", n), |b| {
            b.iter(|| optim::adamw(&config, black_box(&mut p), &mut m, &mut v, &grad));
        });
        group.throughput(Throughput::Bytes(4 * n as u64));
        group.bench_function(BenchmarkId::new("sum_of_squares", n), |b| {
            b.iter(|| optim::sum_of_squares(black_box(&grad)));
        });
        group.throughput(Throughput::Bytes(12 * n as u64));
        group.bench_function(BenchmarkId::new("moving_average", n), |b| {
            b.iter(|| optim::moving_average(black_box(&mut m), &p, 0.9999));
        });
    }
}

fn optim_gpu(c: &mut Criterion) {
    common::gpu::family(c, "optim", common::optim::cases);
}

criterion_group!(group, benches, optim_gpu);
criterion_main!(group);
