//! Linear layers and GELU: of the CPU device over the shapes of ViT-Ti, -S and -B, on a GPU to ViT-22B.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use trencadis::cpu::gemm;
use trencadis::recipe::GeluKind;

mod common;
use common::gemm::tune::Tuning;
use common::{TOKENS, WIDTHS, random};

/// In f32, and with operands rounded to bf16.
fn linear(c: &mut Criterion, name: &str, bf16: bool) {
    let _bf16 = bf16.then(gemm::bf16::InUse::begin);
    let mut group = c.benchmark_group(name);
    for width in WIDTHS {
        for (inner, outer) in [(width, 3 * width), (width, 4 * width), (4 * width, width)] {
            let (x, w, bias) = (random(TOKENS * inner), random(outer * inner), random(outer));
            let (mut y, mut pre, dy) =
                (vec![0f32; TOKENS * outer], vec![0f32; TOKENS * outer], random(TOKENS * outer));
            let (mut dx, mut dw) = (vec![0f32; TOKENS * inner], vec![0f32; outer * inner]);
            group.throughput(Throughput::Elements(2 * (TOKENS * inner * outer) as u64));
            let shape = format!("{TOKENS}x{inner}->{outer}");
            group.bench_function(BenchmarkId::new("forward", &shape), |b| {
                b.iter(|| gemm::linear(black_box(&mut y), &x, &w, Some(&bias), inner, outer));
            });
            group.bench_function(BenchmarkId::new("forward_gelu", &shape), |b| {
                b.iter(|| {
                    let pre = Some(black_box(&mut pre[..]));
                    gemm::linear_gelu(&mut y, pre, &x, &w, Some(&bias), inner, outer, GeluKind::Erf);
                });
            });
            group.bench_function(BenchmarkId::new("input_grad", &shape), |b| {
                b.iter(|| gemm::linear_input_grad(black_box(&mut dx), &dy, &w, inner, outer));
            });
            group.bench_function(BenchmarkId::new("weight_grad", &shape), |b| {
                b.iter(|| gemm::linear_weight_grad(black_box(&mut dw), &dy, &x, inner, outer));
            });
        }
    }
}

fn elementwise(c: &mut Criterion) {
    let mut group = c.benchmark_group("elementwise");
    for width in WIDTHS {
        let n = TOKENS * 4 * width;
        let (x, mut y, mut db) = (random(n), random(n), random(4 * width));
        let shape = format!("{TOKENS}x{}", 4 * width);
        group.throughput(Throughput::Bytes(8 * n as u64));
        for (name, kind) in [("gelu_erf", GeluKind::Erf), ("gelu_tanh", GeluKind::Tanh)] {
            group.bench_function(BenchmarkId::new(name, &shape), |b| {
                b.iter(|| gemm::gelu(black_box(&mut y), &x, kind));
            });
        }
        group.throughput(Throughput::Bytes(12 * n as u64));
        for (name, kind) in [("gelu_erf_grad", GeluKind::Erf), ("gelu_tanh_grad", GeluKind::Tanh)] {
            group.bench_function(BenchmarkId::new(name, &shape), |b| {
                // Multiplied in place again and again, y would end in subnormal numbers.
                let fresh = || y.clone();
                b.iter_batched_ref(fresh, |dx| gemm::gelu_grad(dx, &x, kind), BatchSize::LargeInput);
            });
        }
        group.throughput(Throughput::Bytes(4 * n as u64));
        group.bench_function(BenchmarkId::new("bias_grad", &shape), |b| {
            b.iter(|| gemm::bias_grad(black_box(&mut db), &x));
        });
    }
}

fn main() {
    // What `tools/tune-gemm` asks for.
    if common::gpu::tune::asked("gemm", "gemm-tiles", |gpu, out| {
        common::gemm::tune::run(gpu, &Tuning::of_vits(), out)
    }) {
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    linear(&mut criterion, "linear", false);
    linear(&mut criterion, "linear-bf16", true);
    elementwise(&mut criterion);
    common::gpu::family(&mut criterion, "gemm", common::gemm::cases);
    common::gemm::sharded::family(&mut criterion);
    criterion.final_summary();
}
