//! Losses on the CPU device and on a GPU: a class an image, ImageNet-1k and ImageNet-21k heads.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use trencadis::cpu::loss;
use trencadis::data::batch::Targets;
use trencadis::ops::{ClassificationLoss, LossKind};

mod common;
use common::random;

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("loss");
    for (images, classes) in [(16_384, 1000), (1024, 21_843)] {
        let n = images * classes;
        let (logits, weights) = (random(n), vec![1f32; images]);
        let targets = Targets::Classes((0..images).map(|i| (i * 7 % classes) as i32).collect());
        let (mut loss, mut dlogits) = (vec![0f32; images], vec![0f32; n]);
        let shape = format!("{images}x{classes}");
        group.throughput(Throughput::Bytes(8 * n as u64));
        for (name, kind) in [("softmax", LossKind::Softmax), ("sigmoid", LossKind::Sigmoid)] {
            let of = ClassificationLoss { smoothing: 0.1, ..kind.into() };
            group.bench_function(BenchmarkId::new(name, &shape), |b| {
                b.iter(|| {
                    let d = black_box(&mut dlogits);
                    loss::cross_entropy(of, &mut loss, d, &logits, &targets, &weights, classes, 1.0);
                });
            });
        }
    }
}

fn loss_gpu(c: &mut Criterion) {
    common::gpu::family(c, "loss", common::loss::cases);
}

criterion_group!(group, benches, loss_gpu);
criterion_main!(group);
