//! Optimiser over the parameters of Vision Transformers, on the CPU device and on a GPU.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use trencadis::cpu::optim::adafactor::{self, Adafactor as Config, Factoring};
use trencadis::cpu::optim::{self, AdamW, Sgd};

mod common;
use common::{WIDTHS, random};

const FACTORED: Config = Config { lr: 1e-3, momentum: 0.9, weight_decay: 0.05, grad_scale: 1.0 };

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
        group.throughput(Throughput::Bytes(20 * n as u64));
        let Config { lr, momentum, weight_decay, grad_scale } = FACTORED;
        let momentum = Sgd { lr, momentum, nesterov: false, weight_decay, grad_scale };
        group.bench_function(BenchmarkId::new("sgd", n), |b| {
            b.iter(|| optim::sgd(&momentum, black_box(&mut p), &mut m, &grad));
        });
        let factoring = Factoring::of(&[n / width, width]);
        let (mut half, mut second) = (vec![bf16::ZERO; n], vec![0f32; factoring.len()]);
        group.throughput(Throughput::Bytes(20 * n as u64));
        group.bench_function(BenchmarkId::new("adafactor", n), |b| {
            b.iter(|| {
                let mut sums = vec![0f64; factoring.len()];
                adafactor::add_squares(factoring, 0..n, &grad, grad_scale, &mut sums);
                let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
                let factors = adafactor::update(factoring, 0.99, &sums, &mut second);
                let p = black_box(&mut p);
                adafactor::apply((&FACTORED, factoring), 0..n, &factors, p, &mut half, &grad);
            });
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
