//! Cases of the kernels of patches and prefix tokens.

use half::bf16;
use trencadis::device::{Ptr, Stream};
use trencadis::kernels::patch::{
    NormaliseParams, PrefixParams, factors, launch_normalise, launch_prefix_grad, launch_prefix_write,
    prefix_workspace_bytes, row_stride,
};
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Queue, Sink};
use super::shapes::{Images, Shape, own};

/// Tokens of a batch.
const TOKENS: usize = 32_768;
/// Prefix tokens of an image: cls and four registers.
const PREFIX: usize = 5;

/// The shapes to measure, for all that works on embedded rows.
///
/// # Errors
/// Own shapes that cannot be read.
pub fn shapes() -> Result<Vec<(usize, Images)>> {
    if let Some(own) = own().map_err(Error::usage)? {
        return Ok(own.into_iter().filter_map(embedding).collect());
    }
    let mix = Images::mix(64.0, 512.0, TOKENS);
    Ok([192, 768, 1024].map(|width| (width, mix.clone())).to_vec())
}

fn embedding(shape: Shape) -> Option<(usize, Images)> {
    match shape {
        Shape::Embedding { width, images } => Some((width, images)),
        _ => None,
    }
}

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    for (i, (width, images)) in shapes()?.into_iter().enumerate() {
        if i == 0 {
            for side in [16, 14] {
                normalise_cases(gpu, side, &images, sink)?;
            }
        }
        prefix_cases(gpu, width, &images, sink)?;
    }
    Ok(())
}

/// Three channels, patches of `side` pixels along a side.
///
/// # Errors
/// A device that fails.
pub fn normalise_cases(gpu: &Gpu, side: usize, images: &Images, sink: &mut Sink<'_>) -> Result<()> {
    let (tokens, plane) = (images.tokens(), side * side);
    let (width, stride) = (3 * plane, row_stride(3 * plane));
    let factors = gpu.device.upload(&factors(&[0.485, 0.456, 0.406], &[0.229, 0.224, 0.225], 3)?)?;
    let positions = gpu.device.upload(&vec![3u16; 2 * tokens])?;
    for (name, size, u8_pixels) in [("patch_normalise_u8", 1, true), ("patch_normalise_f32", 4, false)] {
        let bytes = tokens * (size * width + 2 * stride);
        let sets = gpu.sets(bytes);
        // The bits of random numbers in bf16 are random pixels, and pairs of them random numbers in f32.
        let patches = gpu.random(sets, (tokens * width * size).div_ceil(2))?;
        let out = gpu.room::<bf16>(sets, tokens * stride)?;
        let launch = |stream: &Stream, set: usize| {
            let params = NormaliseParams {
                out: out.ptr(set),
                patches: patches.ptr(set).cast(),
                factors: factors.ptr(),
                positions: positions.ptr(),
                live: Ptr::null(),
                out_stride: stride as i64,
                tokens: tokens as i32,
                width: width as i32,
                plane: plane as i32,
            };
            // SAFETY: every operand lies in a live buffer of the size that the shape asks for.
            unsafe { launch_normalise(gpu.device.kernels(), stream.raw(), &params, u8_pixels) }
        };
        sink(&Case {
            kernel: name.into(),
            shape: format!("3x{side}x{side}_{}", images.name),
            operations: 0.0,
            bytes: bytes as f64,
            sets,
            launch: &launch,
        })?;
    }
    Ok(())
}

/// Five prefix tokens an image.
///
/// # Errors
/// A device that fails.
pub fn prefix_cases(gpu: &Gpu, width: usize, images: &Images, sink: &mut Sink<'_>) -> Result<()> {
    let (rows, slots) = (images.tokens(), images.lengths.len());
    let kernels = gpu.device.kernels();
    let bytes = 2 * slots * PREFIX * width;
    let sets = gpu.sets(2 * rows * width);
    let x = gpu.random(sets, rows * width)?;
    let cu_seqlens = gpu.device.upload(&images.cu_seqlens())?;
    let tokens = gpu.device.upload(&super::random(PREFIX * width))?;
    let dtokens = gpu.room::<f32>(1, PREFIX * width)?;
    let workspace = gpu.room::<f32>(1, prefix_workspace_bytes(slots, PREFIX, width) / 4)?;
    let params = |set: usize| PrefixParams {
        x: x.ptr(set),
        tokens: tokens.ptr(),
        partial: workspace.ptr(0),
        cu_seqlens: cu_seqlens.ptr(),
        x_stride: width as i64,
        rows: rows as i32,
        images: slots as i32,
        prefix: PREFIX as i32,
        width: width as i32,
    };
    // SAFETY: every operand lies in a live buffer of the size that the shape asks for.
    let write =
        |stream: &Stream, set: usize| unsafe { launch_prefix_write(kernels, stream.raw(), &params(set)) };
    let grad = |stream: &Stream, set: usize| {
        // SAFETY: as above.
        unsafe { launch_prefix_grad(kernels, stream.raw(), &params(set), dtokens.ptr(0), Ptr::null()) }
    };
    let mut put = |kernel: &str, times: usize, launch: &Queue<'_>| {
        let shape = format!("{PREFIX}x{width}_{}", images.name);
        let bytes = (times * bytes) as f64;
        sink(&Case { kernel: kernel.into(), shape, operations: 0.0, bytes, sets, launch })
    };
    put("patch_prefix_write", 1, &write)?;
    put("patch_prefix_grad", 2, &grad)
}
