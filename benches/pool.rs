//! Pooling over NaViT's mix of image sizes, on the CPU device and on a GPU. Throughput counts the bytes of
//! the tokens read and written.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use trencadis::cpu::attention::{AttentionConfig, QkAffine, QkAffineGrad};
use trencadis::cpu::pool::{attention_backward, attention_forward, mean_backward, mean_forward};
use trencadis::recipe::{QkNormKind, Rope};

mod common;
use common::{WIDTHS, ragged, random};

const HEAD_DIM: usize = 64;

fn pool(c: &mut Criterion) {
    let mut group = c.benchmark_group("pool");
    let cu_seqlens = ragged();
    let (tokens, images) = (cu_seqlens[cu_seqlens.len() - 1] as usize, cu_seqlens.len() - 1);
    for width in WIDTHS {
        let heads = width / HEAD_DIM;
        let config = AttentionConfig {
            heads,
            kv_heads: heads,
            head_dim: HEAD_DIM,
            scale: 0.125,
            norm: QkNormKind::Rms,
            eps: 1e-6,
            gain_per_head: true,
            rope: Rope::None,
        };
        let (q, kv, dout) = (random(width), random(tokens * 2 * width), random(images * width));
        let gain = random(width);
        let affine = QkAffine { q_gain: Some(&gain), k_gain: Some(&gain), ..QkAffine::default() };
        let (mut out, mut lse) = (vec![0f32; images * width], vec![0f32; images * heads]);
        let (mut dq, mut dkv) = (vec![0f32; width], vec![0f32; kv.len()]);
        let (mut dq_gain, mut dk_gain) = (vec![0f32; width], vec![0f32; width]);
        let x = random(tokens * width);
        let mut dx = random(tokens * width);

        group.throughput(Throughput::Bytes(4 * kv.len() as u64));
        group.bench_function(BenchmarkId::new("attention_forward", width), |b| {
            b.iter(|| {
                attention_forward(&config, black_box(&mut out), &mut lse, &q, &kv, affine, &cu_seqlens, 0)
            });
        });
        group.throughput(Throughput::Bytes(8 * kv.len() as u64));
        group.bench_function(BenchmarkId::new("attention_backward", width), |b| {
            b.iter(|| {
                let daffine = QkAffineGrad {
                    q_gain: Some(&mut dq_gain),
                    k_gain: Some(&mut dk_gain),
                    ..QkAffineGrad::default()
                };
                attention_backward(
                    &config,
                    black_box(&mut dq),
                    &mut dkv,
                    daffine,
                    &dout,
                    &out,
                    &lse,
                    &q,
                    &kv,
                    affine,
                    &cu_seqlens,
                    0,
                )
            });
        });
        group.throughput(Throughput::Bytes(4 * x.len() as u64));
        group.bench_function(BenchmarkId::new("mean_forward", width), |b| {
            b.iter(|| mean_forward(black_box(&mut out), &x, &cu_seqlens, 0, width));
        });
        group.bench_function(BenchmarkId::new("mean_backward", width), |b| {
            b.iter(|| mean_backward(black_box(&mut dx), &dout, &cu_seqlens, 0, width));
        });
    }
}

fn pool_gpu(c: &mut Criterion) {
    common::gpu::family(c, "pool", common::pool::cases);
}

criterion_group!(benches, pool, pool_gpu);
criterion_main!(benches);
