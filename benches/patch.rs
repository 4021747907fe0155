//! Patch normalisation and prefix tokens, on the CPU device and on a GPU. Throughput counts the bytes read and
//! written.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use trencadis::cpu::patch::{normalise, write_prefix};
use trencadis::data::batch::Patches;

mod common;
use common::{TOKENS, WIDTHS, ragged, random};

const PATCH_DIM: usize = 3 * 16 * 16;

fn patches(c: &mut Criterion) {
    let mut group = c.benchmark_group("patch");
    let values = random(TOKENS * PATCH_DIM);
    let pixels = values.iter().map(|x| (x * 40.0 + 128.0) as u8).collect();
    let positions = vec![[0, 0]; TOKENS];
    let mut out = vec![0f32; TOKENS * PATCH_DIM];
    let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    for (name, patches, size) in [("u8", Patches::U8(pixels), 1), ("f32", Patches::F32(values), 4)] {
        group.throughput(Throughput::Bytes((TOKENS * PATCH_DIM * (size + 4)) as u64));
        group.bench_function(BenchmarkId::new("normalise", name), |b| {
            b.iter(|| normalise(black_box(&mut out), &patches, &positions, &mean, &std, PATCH_DIM));
        });
    }
    let cu_seqlens = ragged();
    let images = cu_seqlens.len() - 1;
    for width in WIDTHS {
        let (mut x, tokens) = (random(TOKENS * width), random(width));
        group.throughput(Throughput::Bytes((images * width * 8) as u64));
        group.bench_function(BenchmarkId::new("write_prefix", width), |b| {
            b.iter(|| write_prefix(black_box(&mut x), &tokens, &cu_seqlens, 1, width));
        });
    }
    group.finish();
}

fn patches_gpu(c: &mut Criterion) {
    common::gpu::family(c, "patch", common::patch::cases);
}

criterion_group!(benches, patches, patches_gpu);
criterion_main!(benches);
