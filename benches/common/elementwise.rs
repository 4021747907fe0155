//! Cases of the kernels of elementwise sums and GELU.

use half::bf16;
use trencadis::Result;
use trencadis::device::{Ptr, Stream};
use trencadis::kernels::elementwise::{
    AccumulateParams, AddParams, GeluParams, launch_accumulate, launch_add, launch_gelu,
};

use super::gpu::{Case, Gpu, Queue, Sink};
use super::shapes::Images;

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    for (width, images) in super::patch::shapes()? {
        shape_cases(gpu, width, &images, sink)?;
    }
    Ok(())
}

/// The cases of one shape.
///
/// # Errors
/// A device that fails.
pub fn shape_cases(gpu: &Gpu, width: usize, images: &Images, sink: &mut Sink<'_>) -> Result<()> {
    let rows = images.tokens();
    let kernels = gpu.device.kernels();
    let size = rows * width;
    let sets = gpu.sets(6 * size);
    let [a, b] = [gpu.random(sets, size)?, gpu.random(sets, size)?];
    let (out, sum) = (gpu.room::<bf16>(sets, size)?, gpu.room::<f32>(sets, size)?);
    let row = gpu.device.upload(&super::random(width))?;
    let params = |set: usize, b: Ptr<bf16>| AddParams {
        out: out.ptr(set),
        a: a.ptr(set),
        b,
        row: row.ptr(),
        live: Ptr::null(),
        rows: rows as i32,
        width: width as i32,
    };
    // SAFETY: every operand lies in a live buffer of the size that the shape asks for.
    let add =
        |stream: &Stream, set: usize| unsafe { launch_add(kernels, stream.raw(), &params(set, b.ptr(set))) };
    // SAFETY: as above.
    let add_row =
        |stream: &Stream, set: usize| unsafe { launch_add(kernels, stream.raw(), &params(set, Ptr::null())) };
    let accumulate = |stream: &Stream, set: usize| {
        let params =
            AccumulateParams { out: sum.ptr(set), x: a.ptr(set), accumulate: Ptr::null(), size: size as i64 };
        // SAFETY: as above.
        unsafe { launch_accumulate(kernels, stream.raw(), &params) }
    };
    let gelu = |stream: &Stream, set: usize| {
        let params = GeluParams {
            out: out.ptr(set),
            x: a.ptr(set),
            live: Ptr::null(),
            rows: rows as i32,
            width: width as i32,
            gelu: 1,
        };
        // SAFETY: as above.
        unsafe { launch_gelu(kernels, stream.raw(), &params) }
    };
    let mut put = |kernel: &str, bytes: usize, launch: &Queue<'_>| {
        let (kernel, shape) = (format!("elementwise_{kernel}"), format!("{rows}x{width}"));
        sink(&Case { kernel, shape, operations: 0.0, bytes: (bytes * size) as f64, sets, launch })
    };
    put("add", 6, &add)?;
    put("add_row", 4, &add_row)?;
    put("gelu", 4, &gelu)?;
    put("accumulate", 6, &accumulate)
}
