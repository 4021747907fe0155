//! Packed attention: of the CPU device over NaViT's mix of image sizes and over one long image, and on a GPU.
//! Throughput counts the matrix products: 4 S² Dh forward and 10 S² Dh backward (scores, dP, dV, dQ,
//! dK) per image and head.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use trencadis::cpu::attention::{AttentionConfig, QkAffine, QkAffineGrad, backward, forward};
use trencadis::recipe::{QkNormKind, Rope};

mod common;
use common::attention::tune::Tuning;
use common::{TOKENS, ragged, random};

const HEAD_DIM: usize = 64;

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    let cases = [
        ("ragged", ragged(), QkNormKind::Rms),
        ("ragged_no_norm", ragged(), QkNormKind::None),
        ("one_image", vec![0, TOKENS as i32], QkNormKind::Rms),
    ];
    for (name, cu_seqlens, norm) in &cases {
        for heads in [3, 6] {
            let config = AttentionConfig {
                heads,
                kv_heads: heads,
                head_dim: HEAD_DIM,
                scale: 0.125,
                norm: *norm,
                eps: 1e-6,
                gain_per_head: true,
                rope: Rope::None,
            };
            let tokens = cu_seqlens[cu_seqlens.len() - 1] as usize;
            let width = heads * HEAD_DIM;
            let (qkv, dout, gain) = (random(tokens * 3 * width), random(tokens * width), random(width));
            let affine = QkAffine { q_gain: Some(&gain), k_gain: Some(&gain), ..QkAffine::default() };
            let (mut out, mut lse) = (vec![0f32; tokens * width], vec![0f32; tokens * heads]);
            let mut dqkv = vec![0f32; qkv.len()];
            let (mut dq_gain, mut dk_gain) = (vec![0f32; width], vec![0f32; width]);
            let squares: usize = cu_seqlens.windows(2).map(|s| ((s[1] - s[0]) as usize).pow(2)).sum();

            group.throughput(Throughput::Elements((4 * squares * width) as u64));
            group.bench_function(BenchmarkId::new(format!("{name}_forward"), heads), |b| {
                b.iter(|| forward(&config, black_box(&mut out), &mut lse, &qkv, affine, None, cu_seqlens));
            });
            group.throughput(Throughput::Elements((10 * squares * width) as u64));
            group.bench_function(BenchmarkId::new(format!("{name}_backward"), heads), |b| {
                b.iter(|| {
                    let daffine = QkAffineGrad {
                        q_gain: Some(&mut dq_gain),
                        k_gain: Some(&mut dk_gain),
                        ..QkAffineGrad::default()
                    };
                    let dqkv = black_box(&mut dqkv);
                    backward(&config, dqkv, daffine, &dout, &out, &lse, &qkv, affine, None, cu_seqlens);
                });
            });
        }
    }
}

fn main() {
    // What `tools/measure-attention` asks for.
    if common::gpu::tune::asked("attention", "attention-plans", |gpu, out| {
        common::attention::tune::run(gpu, &Tuning::of_vits(), out)
    }) {
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    attention(&mut criterion);
    common::gpu::family(&mut criterion, "attention", common::attention::cases);
    criterion.final_summary();
}
