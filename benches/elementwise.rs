//! Sums of whole tensors, on the CPU device and on a GPU. Throughput counts the bytes read and written.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use trencadis::cpu::elementwise::{add, add_row};

mod common;
use common::{TOKENS, WIDTHS, random};

fn elementwise(c: &mut Criterion) {
    let mut group = c.benchmark_group("elementwise");
    for width in WIDTHS {
        let (mut y, x, row) = (random(TOKENS * width), random(TOKENS * width), random(width));
        group.throughput(Throughput::Bytes(12 * y.len() as u64));
        group.bench_function(BenchmarkId::new("add", width), |b| b.iter(|| add(black_box(&mut y), &x)));
        group.throughput(Throughput::Bytes(8 * y.len() as u64));
        group.bench_function(BenchmarkId::new("add_row", width), |b| {
            b.iter(|| add_row(black_box(&mut y), &row));
        });
    }
}

fn elementwise_gpu(c: &mut Criterion) {
    common::gpu::family(c, "elementwise", common::elementwise::cases);
}

criterion_group!(benches, elementwise, elementwise_gpu);
criterion_main!(benches);
