//! LayerNorm and RMSNorm, on the CPU device and on a GPU.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use trencadis::cpu::norm;
use trencadis::recipe::NormKind;

mod common;
use common::{TOKENS, WIDTHS, random};

/// Rows of many batches: more than the cache holds.
const ROWS: usize = 8 * TOKENS;

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("norm");
    for width in WIDTHS {
        let n = ROWS * width;
        let (x, dy, gain, bias) = (random(n), random(n), random(width), random(width));
        let (mut y, mut stats) = (vec![0f32; n], vec![0f32; 2 * ROWS]);
        let (mut dgain, mut dbias) = (vec![0f32; width], vec![0f32; width]);
        let shape = format!("{ROWS}x{width}");
        for (name, kind) in [("layernorm", NormKind::LayerNorm), ("rmsnorm", NormKind::Rms)] {
            group.throughput(Throughput::Bytes(8 * n as u64));
            group.bench_function(BenchmarkId::new(format!("{name}_forward"), &shape), |b| {
                b.iter(|| {
                    let (gain, bias) = (Some(&gain[..]), Some(&bias[..]));
                    norm::forward(black_box(&mut y), &mut stats, &x, gain, bias, width, kind, 1e-6);
                });
            });
            group.throughput(Throughput::Bytes(12 * n as u64));
            group.bench_function(BenchmarkId::new(format!("{name}_backward"), &shape), |b| {
                b.iter(|| {
                    let grads = (Some(&mut dgain[..]), Some(&mut dbias[..]));
                    let dx = black_box(&mut y);
                    norm::backward(dx, grads.0, grads.1, &dy, &x, &stats, Some(&gain), width, kind);
                });
            });
        }
    }
}

fn norm_gpu(c: &mut Criterion) {
    common::gpu::family(c, "norm", common::norm::cases);
}

criterion_group!(group, benches, norm_gpu);
criterion_main!(group);
