//! Cases of the kernels that make patches of pictures.

use half::bf16;
use trencadis::device::{Buffer, Stream};
use trencadis::kernels::patch::{factors, row_stride};
use trencadis::kernels::view::{
    Axis, MOST_OPS, Op, PatchesParams, Picture, Record, ResizeParams, Shares, Source, launch_patches,
    launch_resize, records,
};
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Sink};
use super::shapes::{Shape, own};

const SIDE: usize = 16;
const CHANNELS: usize = 3;

/// Hands every case to `sink`: without shapes of one's own, photographs of 500x375 pixels seen at 224x224.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    let usual = Shape::View { size: (375, 500), target: 224, images: 128 };
    for shape in own().map_err(Error::usage)?.unwrap_or(vec![usual]) {
        if let Shape::View { size, target, images } = shape {
            shape_cases(gpu, images, size, target, sink)?;
        }
    }
    Ok(())
}

/// A batch in device memory.
struct Batch {
    records: Buffer<Record>,
    counts: Buffer<i32>,
    rows: Buffer<i32>,
    data: Buffer<u8>,
    pixels: Buffer<u8>,
    means: Buffer<i32>,
    out: Buffer<bf16>,
}

/// So many images of `size` (height, width) at `target` pixels a side, a multiple of the patch, in other contrast.
///
/// # Errors
/// A reduction for which the kernel has no room, a device that fails.
pub fn shape_cases(
    gpu: &Gpu,
    images: usize,
    size: (usize, usize),
    target: usize,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let (device, kernels) = (&gpu.device, gpu.device.kernels());
    let values: Vec<u8> =
        super::random(size.0 * size.1 * CHANNELS).iter().map(|x| (x * 40.0 + 128.0) as u8).collect();
    let source = Source { pixels: &values, width: size.1, channels: CHANNELS };
    let axis = |from: usize| Axis::new(from, 0.0, from as f64, target);
    let room = Shares { bytes: usize::MAX, pixels: usize::MAX };
    let picture = Picture::new(source, &axis(size.0), &axis(size.1), &[Op::BlendMean(1.2)], room);
    let picture = picture.ok_or_else(|| {
        Error::usage(format!(
            "{}x{} pixels have no kernel that makes {target} a side of them",
            size.0, size.1
        ))
    })?;
    let pictures = vec![picture; images];
    let (each, across) = ((target / SIDE).pow(2), target / SIDE);
    let tokens = images * each;
    let place = |token: usize| {
        let patch = token % each;
        [token / each + 1, patch / across * SIDE, patch % across * SIDE].map(|x| x as i32)
    };
    let rows: Vec<i32> = (0..tokens).flat_map(place).collect();
    let data: Vec<u8> = pictures.iter().flat_map(|picture| picture.bytes()).copied().collect();
    let (described, counts) = records(&pictures);
    let stride = row_stride(CHANNELS * SIDE * SIDE);
    let seen = images * (target * target * CHANNELS).next_multiple_of(16);
    let sets = gpu.sets(data.len() + seen + 2 * tokens * stride);
    let batch = |_| {
        Ok(Batch {
            records: device.upload(&described)?,
            counts: device.upload(&counts)?,
            rows: device.upload(&rows)?,
            data: device.upload(&data)?,
            pixels: device.zeros(seen)?,
            means: device.zeros(images * MOST_OPS)?,
            out: device.zeros(tokens * stride)?,
        })
    };
    let batches: Vec<Batch> = (0..sets).map(batch).collect::<Result<_>>()?;
    let factors = device.upload(&factors(&[0.5], &[0.25], CHANNELS)?)?;
    let resize = |stream: &Stream, set: usize| {
        let Batch { records, counts, data, pixels, .. } = &batches[set];
        let params = ResizeParams {
            records: records.ptr(),
            counts: counts.ptr(),
            data: data.ptr(),
            pixels: pixels.ptr(),
        };
        // SAFETY: the records lead into buffers of the sizes that they were made for.
        unsafe { launch_resize(kernels, stream.raw(), &params, CHANNELS, device.info().multiprocessors) }
    };
    let patches = |stream: &Stream, set: usize| {
        let Batch { records, counts, rows, pixels, means, out, .. } = &batches[set];
        let params = PatchesParams {
            records: records.ptr(),
            counts: counts.ptr(),
            rows: rows.ptr(),
            pixels: pixels.ptr(),
            means: means.ptr(),
            factors: factors.ptr(),
            out: out.ptr(),
            out_stride: stride as i64,
            side: SIDE as i32,
        };
        // SAFETY: as above.
        unsafe { launch_patches(kernels, stream.raw(), &params, CHANNELS, tokens, images) }
    };
    let shape = format!("{images}x{}x{}_{target}", size.0, size.1);
    let case = |kernel: &str, bytes: usize, launch| Case {
        kernel: kernel.into(),
        shape: shape.clone(),
        operations: 0.0,
        bytes: bytes as f64,
        sets,
        launch,
    };
    sink(&case("view_resize", data.len() + seen, &resize))?;
    // The mean of each picture, then its patches.
    sink(&case("view_patches", 2 * seen + 2 * tokens * stride, &patches))
}
