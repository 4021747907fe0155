//! Cases of the pooling kernels.

use half::bf16;
use trencadis::cpu::attention::AttentionConfig;
use trencadis::device::{Ptr, Stream};
use trencadis::kernels::pool::{
    AttentionBackwardParams, AttentionForwardParams, AttentionPool, AttentionQuery, GatherParams,
    MeanBackwardParams, MeanForwardParams, MeanPool, PackedSizes, launch_attention_backward,
    launch_attention_forward, launch_gather_backward, launch_gather_forward, launch_mean_backward,
    launch_mean_forward,
};
use trencadis::recipe::{QkNormKind, Rope};
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Queue, Sink};
use super::shapes::{Images, Shape, own};

/// Tokens of a batch.
const TOKENS: usize = 32_768;

/// The shapes to measure.
fn shapes() -> Result<Vec<Shape>> {
    if let Some(own) = own().map_err(Error::usage)? {
        return Ok(own);
    }
    let mut shapes = Vec::new();
    for (heads, head_dim) in [(3, 64), (12, 64), (16, 64), (16, 80), (48, 128)] {
        let same = [64, 196, 256, 577, 1024, 4096].map(|length| Images::same(TOKENS / length, length));
        let mixes = [256.0, 512.0].map(|high| Images::mix(64.0, high, TOKENS));
        let images = same.into_iter().chain(mixes);
        shapes.extend(images.map(|images| Shape::Pool { heads, head_dim, images }));
    }
    Ok(shapes)
}

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    for shape in shapes()? {
        if let Shape::Pool { heads, head_dim, images } = shape {
            shape_cases(gpu, heads, head_dim, &images, sink)?;
        }
    }
    Ok(())
}

/// The cases of one shape.
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
    let (width, tokens, slots) = (heads * head_dim, images.tokens(), images.lengths.len());
    let sizes = PackedSizes { tokens, images: slots, skip: 0 };
    let config = AttentionConfig {
        heads,
        kv_heads: heads,
        head_dim,
        scale: 1.0 / (head_dim as f64).sqrt(),
        norm: QkNormKind::Rms,
        eps: 1e-6,
        gain_per_head: true,
        rope: Rope::None,
    };
    let shape = AttentionPool { config, sizes, queries: 1 }.shape()?;
    let mean = MeanPool { sizes, width };
    let kernels = gpu.device.kernels();
    let name = format!("{heads}x{head_dim}_{}", images.name);
    // Bytes of one [T, width].
    let rows = 2 * tokens * width;
    let sets = gpu.sets(4 * rows);
    let cu_seqlens = gpu.device.upload(&images.cu_seqlens())?;
    let gain = gpu.device.upload(&vec![1.0f32; width])?;
    let (q, dout) = (gpu.random(1, width)?, gpu.random(1, slots * width)?);
    let (out, lse) = (gpu.room::<bf16>(1, slots * width)?, gpu.room::<f32>(1, slots * heads)?);
    let (kv, dkv) = (gpu.random(sets, 2 * tokens * width)?, gpu.room::<bf16>(sets, 2 * tokens * width)?);
    let bytes = shape.forward_workspace_bytes().max(shape.backward_workspace_bytes());
    let workspace = gpu.room::<f32>(1, bytes.max(mean.workspace_bytes()) / 4)?;
    let grads = gpu.room::<f32>(4, width)?;
    let stride = 2 * width as i64;
    let query = AttentionQuery {
        q: q.ptr(0),
        q_f32: Ptr::null(),
        q_gain: gain.ptr(),
        q_bias: Ptr::null(),
        k_gain: gain.ptr(),
        k_bias: Ptr::null(),
    };
    let forward = |stream: &Stream, set: usize| {
        let params = AttentionForwardParams {
            out: out.ptr(0),
            lse: lse.ptr(0),
            partial: workspace.ptr(0),
            k: kv.ptr(set),
            v: kv.ptr(set).offset(width),
            query,
            cu_seqlens: cu_seqlens.ptr(),
            error: Ptr::null(),
            k_stride: stride,
            v_stride: stride,
            shape,
        };
        // SAFETY: every operand lies in a live buffer of the size that the shape asks for.
        unsafe { launch_attention_forward(kernels, stream.raw(), &params) }
    };
    let backward = |stream: &Stream, set: usize| {
        let params = AttentionBackwardParams {
            dk: dkv.ptr(set),
            dv: dkv.ptr(set).offset(width),
            partial: workspace.ptr(0),
            sums: workspace.ptr(0).offset(bytes / 4 - width),
            dout: dout.ptr(0),
            out: out.ptr(0),
            lse: lse.ptr(0),
            k: kv.ptr(set),
            v: kv.ptr(set).offset(width),
            query,
            dq: Ptr::null(),
            dq_f32: grads.ptr(0),
            dq_gain: grads.ptr(1),
            dq_bias: Ptr::null(),
            dk_gain: grads.ptr(2),
            dk_bias: Ptr::null(),
            accumulate: Ptr::null(),
            cu_seqlens: cu_seqlens.ptr(),
            error: Ptr::null(),
            dk_stride: stride,
            dv_stride: stride,
            k_stride: stride,
            v_stride: stride,
            shape,
        };
        // SAFETY: as above.
        unsafe { launch_attention_backward(kernels, stream.raw(), &params) }
    };
    let mean_forward = |stream: &Stream, set: usize| {
        let params = MeanForwardParams {
            out: out.ptr(0),
            partial: workspace.ptr(0),
            x: kv.ptr(set),
            cu_seqlens: cu_seqlens.ptr(),
            error: Ptr::null(),
            x_stride: width as i64,
            tokens: tokens as i32,
            images: slots as i32,
            width: width as i32,
            skip: 0,
        };
        // SAFETY: as above.
        unsafe { launch_mean_forward(kernels, stream.raw(), &params) }
    };
    let mean_backward = |stream: &Stream, set: usize| {
        let params = MeanBackwardParams {
            dx: dkv.ptr(set),
            dout: dout.ptr(0),
            cu_seqlens: cu_seqlens.ptr(),
            error: Ptr::null(),
            dx_stride: width as i64,
            tokens: tokens as i32,
            images: slots as i32,
            width: width as i32,
            skip: 0,
        };
        // SAFETY: as above.
        unsafe { launch_mean_backward(kernels, stream.raw(), &params) }
    };
    let gather = |out: Ptr<bf16>, x: Ptr<bf16>| GatherParams {
        out,
        x,
        cu_seqlens: cu_seqlens.ptr(),
        error: Ptr::null(),
        stride: width as i64,
        tokens: tokens as i32,
        images: slots as i32,
        width: width as i32,
        offset: 0,
    };
    let gather_forward = |stream: &Stream, set: usize| {
        // SAFETY: as above.
        unsafe { launch_gather_forward(kernels, stream.raw(), &gather(out.ptr(0), kv.ptr(set))) }
    };
    let gather_backward = |stream: &Stream, set: usize| {
        // SAFETY: as above.
        unsafe { launch_gather_backward(kernels, stream.raw(), &gather(dkv.ptr(set), dout.ptr(0))) }
    };
    let mut put = |kernel: &str, bytes: usize, launch: &Queue<'_>| {
        let case = Case {
            kernel: kernel.into(),
            shape: name.clone(),
            operations: 0.0,
            bytes: bytes as f64,
            sets,
            launch,
        };
        sink(&case)
    };
    // Backward reads what forward has written, whichever of them is measured.
    let stream = gpu.device.stream()?;
    forward(&stream, 0)?;
    stream.synchronize()?;
    put("pool_attention_forward", 2 * rows, &forward)?;
    put("pool_attention_backward", 4 * rows, &backward)?;
    put("pool_mean_forward", rows, &mean_forward)?;
    put("pool_mean_backward", rows, &mean_backward)?;
    put("pool_gather_forward", 4 * slots * width, &gather_forward)?;
    put("pool_gather_backward", rows, &gather_backward)
}
