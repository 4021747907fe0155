//! Cases of the attention kernels.

pub mod operands;
pub mod tune;

use half::{bf16, f16};
use trencadis::cpu::attention::AttentionConfig;
use trencadis::device::Stream;
use trencadis::kernels::Element;
use trencadis::kernels::attention::{Attention, Backward, Forward, Schedule};
use trencadis::recipe::QkNormKind;
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Queue, Sink};
use super::shapes::{Images, Shape, own};

/// Tokens of a batch.
const TOKENS: usize = 32_768;

/// Heads and head dims of ViT-Ti, -B, -L, So400m, -H, -g, -G and ViT-22B: widths 192 to 6144.
const HEADS: [(usize, usize); 8] =
    [(3, 64), (12, 64), (16, 64), (16, 72), (16, 80), (16, 88), (16, 104), (48, 128)];

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
    // Kernels of f16 differ in nothing but the instructions for it.
    for (heads, head_dim) in [(12, 64), (16, 72)] {
        let images = Images::same(TOKENS / 256, 256);
        norm_cases(gpu, heads, head_dim, &images, QkNormKind::Rms, f16::from_f32, sink)?;
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
        norm_cases(gpu, heads, head_dim, images, norm, bf16::from_f32, sink)?;
    }
    schedule_case(gpu, heads, head_dim, images, sink)
}

/// The making of the forward pass's work lists, which reads cu_seqlens and writes an item for each image at least.
fn schedule_case(
    gpu: &Gpu,
    heads: usize,
    head_dim: usize,
    images: &Images,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let (tokens, slots) = (images.tokens(), images.lengths.len());
    let config = AttentionConfig::new(heads, head_dim);
    let limits = Attention { config, tokens, slots }.plan(gpu.device.info())?.limits;
    let cu_seqlens = gpu.device.upload(&images.cu_seqlens())?;
    let schedule = Schedule::new(&gpu.device, limits, tokens, slots)?;
    let launch = |stream: &Stream, _: usize| schedule.launch(stream, &cu_seqlens, None);
    sink(&Case {
        kernel: "schedule".into(),
        shape: format!("{heads}x{head_dim}_{}", images.name),
        operations: 0.0,
        bytes: 4.0 * (2 * slots + 1) as f64,
        sets: 1,
        launch: &launch,
    })
}

/// Of operands that `of` makes.
fn norm_cases<E: Element>(
    gpu: &Gpu,
    heads: usize,
    head_dim: usize,
    images: &Images,
    norm: QkNormKind,
    of: fn(f32) -> E,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let (width, tokens, slots) = (heads * head_dim, images.tokens(), images.lengths.len());
    let config = AttentionConfig { norm, gain_per_head: true, ..AttentionConfig::new(heads, head_dim) };
    let longest = images.lengths.iter().copied().max().unwrap_or(0);
    let attention = Attention { config, tokens, slots };
    let (plan, backward_plan) =
        (attention.plan(gpu.device.info())?, attention.backward_plan(gpu.device.info())?);
    let sets = gpu.sets(2 * 8 * tokens * width);
    let (qkv, dout) =
        (gpu.random_of(sets, 3 * tokens * width, of)?, gpu.random_of(sets, tokens * width, of)?);
    let out = gpu.room::<E>(sets, tokens * width)?;
    let dqkv = gpu.room::<E>(sets, 3 * tokens * width)?;
    let gain = gpu.device.upload(&vec![1.0f32; width])?;
    let (dq_gain, dk_gain) = (gpu.device.zeros::<f32>(width)?, gpu.device.zeros::<f32>(width)?);
    let lse = (0..sets).map(|_| gpu.device.zeros::<f32>(tokens * heads)).collect::<Result<Vec<_>>>()?;
    let bytes = attention
        .backward_workspace_bytes(&backward_plan, longest, true)
        .max(attention.forward_workspace_bytes(&plan, longest));
    let workspace = gpu.device.alloc::<u8>(bytes)?;
    let host = images.cu_seqlens();
    let cu_seqlens = gpu.device.upload(&host)?;
    let stream = gpu.device.stream()?;
    let lists = |limits| {
        let schedule = Schedule::new(&gpu.device, limits, tokens, slots)?.with_longest(longest);
        schedule.launch(&stream, &cu_seqlens, Some(&host))?;
        Ok(schedule)
    };
    let (schedule, backward_schedule): (Schedule, Schedule) =
        (lists(plan.limits)?, lists(backward_plan.limits)?);
    stream.synchronize()?;
    let affine = [Some(&gain), None, Some(&gain), None];
    let [q, k, v] = [0, 1, 2].map(|i| move |set: usize| (set, i * width, 3 * width));
    let rows = |(set, offset, stride)| qkv.rows(set, offset, stride);
    let grads = |(set, offset, stride)| dqkv.rows(set, offset, stride);
    let forward = |stream: &Stream, set: usize| {
        let operands = Forward {
            q: rows(q(set)),
            k: rows(k(set)),
            v: rows(v(set)),
            affine,
            rope: None,
            cu_seqlens: &cu_seqlens,
            schedule: &schedule,
            out: out.rows(set, 0, width),
            lse: &lse[set],
            statistics: None,
            workspace: Some(&workspace),
        };
        attention.forward(stream, &plan, &operands)
    };
    let backward = |stream: &Stream, set: usize| {
        let operands = Backward {
            q: rows(q(set)),
            k: rows(k(set)),
            v: rows(v(set)),
            out: out.rows(set, 0, width),
            lse: &lse[set],
            dout: dout.rows(set, 0, width),
            affine,
            rope: None,
            cu_seqlens: &cu_seqlens,
            schedule: &backward_schedule,
            dq: grads(q(set)),
            dk: grads(k(set)),
            dv: grads(v(set)),
            daffine: [Some(&dq_gain), None, Some(&dk_gain), None],
            accumulate: None,
            workspace: &workspace,
        };
        attention.backward(stream, &backward_plan, &operands)
    };
    let suffix = if norm == QkNormKind::None { "plain" } else { "rms" };
    let element = if E::NAME == bf16::NAME { String::new() } else { format!("_{}", E::NAME) };
    let products = images.squares() * width as f64;
    let mut put = |pass: &str, operations: f64, launch: &Queue<'_>| {
        sink(&Case {
            kernel: format!("attention_{pass}{element}_{suffix}"),
            shape: format!("{heads}x{head_dim}_{}", images.name),
            operations,
            bytes: 0.0,
            sets,
            launch,
        })
    };
    // Backward reads what forward has written to every set, whichever of them is measured.
    (0..sets).try_for_each(|set| forward(&stream, set))?;
    stream.synchronize()?;
    put("forward", 4.0 * products, &forward)?;
    put("backward", 10.0 * products, &backward)
}
