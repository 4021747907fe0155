//! Cases of the residual kernels and of the factors of stochastic depth.

use half::bf16;
use trencadis::Result;
use trencadis::device::{Ptr, Stream};
use trencadis::kernels::gemm::raw::{SumRowsParams, sum_rows};
use trencadis::kernels::residual::{
    BackwardParams, DropPathRate, ForwardParams, KeepParams, SLICE_ROWS, backward_workspace_bytes,
    launch_backward, launch_forward, launch_keep,
};

use super::gpu::{Case, Gpu, Queue, Sink};
use super::norm::shapes;
use super::shapes::Images;

/// Residual branches of a ViT-L.
const BRANCHES: usize = 48;

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    let shapes = shapes()?;
    shapes.iter().try_for_each(|&(rows, width)| shape_cases(gpu, rows, width, sink))?;
    match shapes.first() {
        Some(&(rows, _)) => keep_case(gpu, &Images::mix(64.0, 512.0, rows), BRANCHES, sink),
        None => Ok(()),
    }
}

/// The cases of one shape.
///
/// # Errors
/// A device that fails.
pub fn shape_cases(gpu: &Gpu, rows: usize, width: usize, sink: &mut Sink<'_>) -> Result<()> {
    let kernels = gpu.device.kernels();
    let name = format!("{rows}x{width}");
    // Bytes of one [T, D].
    let bytes = 2 * rows * width;
    let sets = gpu.sets(3 * bytes);
    let (x, branch) = (gpu.random(sets, rows * width)?, gpu.random(sets, rows * width)?);
    let out = gpu.room::<bf16>(sets, rows * width)?;
    let ones = gpu.device.upload(&vec![1.0f32; width.max(rows)])?;
    let live = gpu.device.upload(&[rows as i32])?;
    let workspace = gpu.room::<f32>(1, backward_workspace_bytes(rows, width) / 4)?;
    let dscale = gpu.room::<f32>(1, width)?;
    let forward = |stream: &Stream, set: usize| {
        let params = ForwardParams {
            out: out.ptr(set),
            x: x.ptr(set),
            branch: branch.ptr(set),
            scale: ones.ptr(),
            keep: ones.ptr(),
            live: live.ptr(),
            out_stride: width as i64,
            x_stride: width as i64,
            branch_stride: width as i64,
            tokens: rows as i32,
            width: width as i32,
        };
        // SAFETY: every operand lies in a live buffer of the size that the shape asks for.
        unsafe { launch_forward(kernels, stream.raw(), &params) }
    };
    let backward = |stream: &Stream, set: usize| {
        let params = BackwardParams {
            dbranch: out.ptr(set),
            dscale: workspace.ptr(0),
            dout: x.ptr(set),
            branch: branch.ptr(set),
            scale: ones.ptr(),
            keep: ones.ptr(),
            live: live.ptr(),
            dbranch_stride: width as i64,
            dout_stride: width as i64,
            branch_stride: width as i64,
            tokens: rows as i32,
            width: width as i32,
            rows: SLICE_ROWS as i32,
        };
        let sums = SumRowsParams {
            rows: workspace.ptr(0),
            out: dscale.ptr(0),
            accumulate: Ptr::null(),
            count: rows.div_ceil(SLICE_ROWS) as i32,
            cols: width as i32,
        };
        // SAFETY: as above.
        unsafe {
            launch_backward(kernels, stream.raw(), &params)?;
            sum_rows(kernels, stream.raw(), &sums)
        }
    };
    let mut put = |kernel: &str, launch: &Queue<'_>| {
        let case = Case {
            kernel: kernel.into(),
            shape: name.clone(),
            operations: 0.0,
            bytes: (3 * bytes) as f64,
            sets,
            launch,
        };
        sink(&case)
    };
    put("residual_forward", &forward)?;
    put("residual_backward", &backward)
}

/// The factors of a batch, for all branches of a model.
///
/// # Errors
/// A device that fails.
pub fn keep_case(gpu: &Gpu, images: &Images, branches: usize, sink: &mut Sink<'_>) -> Result<()> {
    let kernels = gpu.device.kernels();
    let (tokens, slots) = (images.tokens(), images.lengths.len());
    let bytes = 4 * branches * tokens;
    let sets = gpu.sets(bytes);
    let keep = gpu.room::<f32>(sets, branches * tokens)?;
    let rates = gpu.device.upload(&vec![DropPathRate::new(0.1); branches])?;
    let (seed, epochs) = (gpu.device.upload(&[7u64])?, gpu.device.zeros::<u64>(slots)?);
    let sample_ids = gpu.device.upload(&(0..slots as u64).collect::<Vec<_>>())?;
    let cu_seqlens = gpu.device.upload(&images.cu_seqlens())?;
    let launch = |stream: &Stream, set: usize| {
        let params = KeepParams {
            keep: keep.ptr(set),
            rates: rates.ptr(),
            seed: seed.ptr(),
            epochs: epochs.ptr(),
            sample_ids: sample_ids.ptr(),
            cu_seqlens: cu_seqlens.ptr(),
            tokens: tokens as i32,
            images: slots as i32,
            first_branch: 0,
        };
        // SAFETY: every operand lies in a live buffer of the size that the shape asks for.
        unsafe { launch_keep(kernels, stream.raw(), &params, branches as u32) }
    };
    sink(&Case {
        kernel: "drop_path_keep".into(),
        shape: format!("{branches}x{}", images.name),
        operations: 0.0,
        bytes: bytes as f64,
        sets,
        launch: &launch,
    })
}
