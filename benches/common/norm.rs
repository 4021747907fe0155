//! Cases of the norm kernels, alone and fused with the residual connection before them.

use half::bf16;
use trencadis::device::{Ptr, Stream};
use trencadis::kernels::norm::{
    BackwardParams, ForwardParams, SumsParams, backward_workspace_bytes, launch_backward, launch_forward,
    launch_sums, partial_rows,
};
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Queue, Sink};
use super::shapes::{Shape, own};

/// Rows of a batch.
const ROWS: usize = 32_768;

/// The shapes to measure: ViT-Ti to ViT-22B.
///
/// # Errors
/// Own shapes that cannot be read.
pub fn shapes() -> Result<Vec<(usize, usize)>> {
    let own = own().map_err(Error::usage)?;
    let Some(own) = own else {
        return Ok([192, 384, 768, 1024, 1152, 1280, 1408, 1664, 6144].map(|width| (ROWS, width)).to_vec());
    };
    let rows = own.into_iter().filter_map(|shape| match shape {
        Shape::Rows { rows, width } => Some((rows, width)),
        _ => None,
    });
    Ok(rows.collect())
}

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    shapes()?.into_iter().try_for_each(|(rows, width)| shape_cases(gpu, rows, width, sink))
}

/// The cases of one shape.
///
/// # Errors
/// A device that fails.
pub fn shape_cases(gpu: &Gpu, rows: usize, width: usize, sink: &mut Sink<'_>) -> Result<()> {
    let kernels = gpu.device.kernels();
    let multiprocessors = gpu.device.info().multiprocessors;
    let name = format!("{rows}x{width}");
    // Bytes of one [T, D].
    let bytes = 2 * rows * width;
    let sets = gpu.sets(6 * bytes);
    let input = || gpu.random(sets, rows * width);
    let (x, branch, dy, dresidual) = (input()?, input()?, input()?, input()?);
    let (first, second) = (gpu.room::<bf16>(sets, rows * width)?, gpu.room::<bf16>(sets, rows * width)?);
    let ones = gpu.device.upload(&vec![1.0f32; width.max(rows)])?;
    // Statistics of the random input: mean 0, standard deviation 1.
    let stats: Vec<f32> = (0..2 * rows).map(|i| (i % 2) as f32).collect();
    let stats = gpu.device.upload(&stats)?;
    let live = gpu.device.upload(&[rows as i32])?;
    let count = partial_rows(rows, width, multiprocessors);
    let workspace = gpu.room::<f32>(1, backward_workspace_bytes(rows, width, 3, multiprocessors) / 4)?;
    let grads = gpu.room::<f32>(3, width)?;
    let null = Ptr::null();
    let forward = |stream: &Stream, set: usize, fused: bool| {
        let params = ForwardParams {
            y: first.ptr(set),
            x_out: if fused { second.ptr(set) } else { null },
            stats: stats.ptr(),
            x: x.ptr(set),
            branch: if fused { branch.ptr(set) } else { null },
            scale: ones.ptr(),
            keep: ones.ptr(),
            gain: ones.ptr(),
            bias: ones.ptr(),
            live: live.ptr(),
            y_stride: width as i64,
            x_out_stride: width as i64,
            x_stride: width as i64,
            branch_stride: width as i64,
            tokens: rows as i32,
            width: width as i32,
            layer_norm: 1,
            eps: 1e-6,
        };
        // SAFETY: every operand lies in a live buffer of the size that the shape asks for.
        unsafe { launch_forward(kernels, stream.raw(), &params) }
    };
    let backward = |stream: &Stream, set: usize, fused: bool| {
        let partial = [0, 1, 2].map(|i| workspace.ptr(0).offset(i * count * width));
        let params = BackwardParams {
            dx: first.ptr(set),
            dbranch: if fused { second.ptr(set) } else { null },
            dgain: partial[0],
            dbias: partial[1],
            dscale: if fused { partial[2] } else { Ptr::null() },
            dy: dy.ptr(set),
            dresidual: dresidual.ptr(set),
            x: x.ptr(set),
            branch: branch.ptr(set),
            stats: stats.ptr(),
            gain: ones.ptr(),
            scale: ones.ptr(),
            keep: ones.ptr(),
            live: live.ptr(),
            dx_stride: width as i64,
            dbranch_stride: width as i64,
            dy_stride: width as i64,
            dresidual_stride: width as i64,
            x_stride: width as i64,
            branch_stride: width as i64,
            tokens: rows as i32,
            width: width as i32,
            layer_norm: 1,
        };
        let sums = SumsParams {
            partial,
            out: [grads.ptr(0), grads.ptr(1), if fused { grads.ptr(2) } else { Ptr::null() }],
            accumulate: Ptr::null(),
            count: count as i32,
            width: width as i32,
        };
        // SAFETY: as above.
        unsafe {
            launch_backward(kernels, stream.raw(), &params)?;
            launch_sums(kernels, stream.raw(), &sums)
        }
    };
    let mut put = |kernel: &str, times: usize, launch: &Queue<'_>| {
        let case = Case {
            kernel: kernel.into(),
            shape: name.clone(),
            operations: 0.0,
            bytes: (times * bytes) as f64,
            sets,
            launch,
        };
        sink(&case)
    };
    put("norm_forward", 2, &|stream, set| forward(stream, set, false))?;
    put("norm_forward_residual", 4, &|stream, set| forward(stream, set, true))?;
    put("norm_backward", 4, &|stream, set| backward(stream, set, false))?;
    put("norm_backward_residual", 6, &|stream, set| backward(stream, set, true))
}
