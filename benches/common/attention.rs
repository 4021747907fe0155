//! Cases of the attention kernels.

use half::bf16;
use trencadis::cpu::attention::AttentionConfig;
use trencadis::device::Stream;
use trencadis::kernels::attention::{Attention, Forward, Schedule, Statistics};
use trencadis::recipe::QkNormKind;
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Sink};
use super::shapes::{Images, Shape, own};

/// Tokens of a batch.
const TOKENS: usize = 32_768;

/// Heads and head dims: those of ViT-L, ViT-H and ViT-22B (48 heads there, 8 of them here).
const HEADS: [(usize, usize); 3] = [(16, 64), (16, 80), (8, 128)];

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    if let Some(own) = own().map_err(Error::usage)? {
        for shape in own {
            if let Shape::Attention { heads, head_dim, images } = shape {
                shape_cases(gpu, heads, head_dim, &images, sink)?;
            }
        }
        return Ok(());
    }
    for (heads, head_dim) in HEADS {
        for length in [64, 196, 256, 577, 1024, 4096] {
            shape_cases(gpu, heads, head_dim, &Images::same(TOKENS / length, length), sink)?;
        }
        for high in [256.0, 512.0] {
            shape_cases(gpu, heads, head_dim, &Images::mix(64.0, high, TOKENS), sink)?;
        }
    }
    Ok(())
}

/// The cases of one shape: with RMS norm of q and k, and without.
///
/// # Errors
/// A shape that the kernels do not take, a device that fails.
pub fn shape_cases(
    gpu: &Gpu,
    heads: usize,
    head_dim: usize,
    images: &Images,
    sink: &mut Sink<'_>,
) -> Result<()> {
    for norm in [QkNormKind::Rms, QkNormKind::None] {
        norm_cases(gpu, heads, head_dim, images, norm, sink)?;
    }
    Ok(())
}

fn norm_cases(
    gpu: &Gpu,
    heads: usize,
    head_dim: usize,
    images: &Images,
    norm: QkNormKind,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let (width, tokens, slots) = (heads * head_dim, images.tokens(), images.lengths.len());
    let scale = 1.0 / (head_dim as f64).sqrt();
    let config = AttentionConfig { heads, head_dim, scale, norm, eps: 1e-6, gain_per_head: true };
    let longest = images.lengths.iter().copied().max().unwrap_or(0);
    let attention = Attention { config, tokens, slots };
    let plan = attention.plan(gpu.device.info())?;
    let sets = gpu.sets(2 * 4 * tokens * width);
    let qkv = gpu.random(sets, 3 * tokens * width)?;
    let out = gpu.room::<bf16>(sets, tokens * width)?;
    let gain = gpu.device.upload(&vec![1.0f32; width])?;
    let of_rows = || gpu.device.zeros::<f32>(tokens * heads);
    let (lse, q_mean, q_rstd, k_mean, k_rstd) = (of_rows()?, of_rows()?, of_rows()?, of_rows()?, of_rows()?);
    let host = images.cu_seqlens();
    let cu_seqlens = gpu.device.upload(&host)?;
    let schedule = Schedule::new(&gpu.device, plan.limits, tokens, slots)?.with_longest(longest);
    let stream = gpu.device.stream()?;
    schedule.launch(&stream, &cu_seqlens, Some(&host))?;
    stream.synchronize()?;
    let normed = norm != QkNormKind::None;
    let statistics = Statistics { q_mean: &q_mean, q_rstd: &q_rstd, k_mean: &k_mean, k_rstd: &k_rstd };
    let forward = |set: usize| Forward {
        q: qkv.rows(set, 0, 3 * width),
        k: qkv.rows(set, width, 3 * width),
        v: qkv.rows(set, 2 * width, 3 * width),
        affine: [Some(&gain), None, Some(&gain), None],
        cu_seqlens: &cu_seqlens,
        schedule: &schedule,
        out: out.rows(set, 0, width),
        lse: &lse,
        statistics: normed.then_some(statistics),
    };
    let launch = |stream: &Stream, set: usize| attention.forward(stream, &plan, &forward(set));
    let suffix = if normed { "rms" } else { "plain" };
    sink(&Case {
        kernel: format!("attention_forward_{suffix}"),
        shape: format!("{heads}x{head_dim}_{}", images.name),
        operations: 4.0 * images.squares() * width as f64,
        bytes: 0.0,
        sets,
        launch: Box::new(launch),
    })
}
