//! Contrastive losses with their gradients on the CPU device and on a GPU.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use trencadis::cpu::contrastive::{Results, contrastive};
use trencadis::recipe::ContrastiveKind::{Sigmoid, Softmax};

mod common;
use common::random;

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("contrastive");
    for (pairs, width) in [(256, 512), (1024, 512)] {
        let n = pairs * width;
        let (images, texts, weights) = (random(n), random(n), vec![1f32; pairs]);
        let (mut per_pair, mut dscale, mut dbias) = (vec![0f32; pairs], 0f32, 0f32);
        let (mut dimages, mut dtexts) = (vec![0f32; n], vec![0f32; n]);
        let shape = format!("{pairs}x{width}");
        group.throughput(Throughput::Elements(6 * (pairs * n) as u64));
        for (kind, name) in [(Softmax, "softmax"), (Sigmoid, "sigmoid")] {
            group.bench_function(BenchmarkId::new(name, &shape), |b| {
                b.iter(|| {
                    let results = Results {
                        per_pair: black_box(&mut per_pair),
                        dimages: &mut dimages,
                        dtexts: &mut dtexts,
                        dscale: &mut dscale,
                        dbias: Some(&mut dbias),
                    };
                    contrastive(results, &images, &texts, 3.0, Some(-3.0), &weights, kind, 1.0);
                });
            });
        }
    }
}

fn contrastive_gpu(c: &mut Criterion) {
    common::gpu::family(c, "contrastive", common::contrastive::cases);
}

criterion_group!(group, benches, contrastive_gpu);
criterion_main!(group);
