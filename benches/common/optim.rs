//! Cases of the optimiser.

use half::bf16;
use trencadis::device::{Ptr, Stream};
use trencadis::kernels::optim::{
    Arena, CastParams, Lines, NormParams, OptimizerState, OptimizerStep, Statistics, TensorSpec,
    UpdateParams, WholeSpec, ZeroParams, launch_adafactor_of, launch_adafactor_sums, launch_adamw,
    launch_cast, launch_lamb, launch_norm, launch_sgd, launch_zero, norm_blocks, workspace_bytes,
};
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Queue, Sink};
use super::random;
use super::shapes::{Shape, own};

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    let usual = [(192, 12), (384, 12), (768, 12), (1024, 24), (1408, 40)];
    let usual = usual.map(|(width, depth)| Shape::Optim { width, depth });
    for shape in own().map_err(Error::usage)?.unwrap_or(usual.into()) {
        if let Shape::Optim { width, depth } = shape {
            shape_cases(gpu, width, depth, sink)?;
        }
    }
    Ok(())
}

/// Matrices and vectors of the blocks of a ViT.
fn specs(width: usize, depth: usize) -> Vec<TensorSpec> {
    let matrix = |rows| TensorSpec { len: rows * width, weight_decay: 0.05, adapts: true };
    let vector = |len| TensorSpec { len, weight_decay: 0.0, adapts: false };
    let matrices = [3, 1, 4, 4].map(|times| matrix(times * width));
    let vectors = [1, 1, 3, 1, 1, 1, 4, 1].map(|times| vector(times * width));
    [matrices.to_vec(), vectors.to_vec()].concat().repeat(depth)
}

/// What Adafactor keeps of them: rows and columns of the matrices, elements of the vectors.
fn statistics(specs: &[TensorSpec], width: usize) -> (Vec<WholeSpec>, Vec<Lines>) {
    let mut end = 0;
    let mut place = |len: usize| -> Vec<Option<usize>> {
        end += len;
        (end - len..end).map(Some).collect()
    };
    let of = |spec: &TensorSpec| match (spec.adapts && width >= 32, spec.len / width) {
        (true, rows) => {
            let (elements, rows_and_columns) = (0..spec.len, [place(rows), place(width)]);
            let [of_rows, columns] = rows_and_columns;
            (WholeSpec::Matrix([rows, width]), Lines::Matrix { elements, rows: of_rows, columns })
        }
        (false, _) => (WholeSpec::Elements(spec.len), Lines::Elements(place(spec.len))),
    };
    specs.iter().map(of).unzip()
}

/// The cases of one shape.
///
/// # Errors
/// A shape that does not fit, a device that fails.
pub fn shape_cases(gpu: &Gpu, width: usize, depth: usize, sink: &mut Sink<'_>) -> Result<()> {
    let kernels = gpu.device.kernels();
    let arena = Arena::new(&specs(width, depth))?;
    let tables = arena.upload(&gpu.device)?;
    let (len, chunks) = (arena.len(), arena.chunks().len());
    let sets = gpu.sets(16 * len);
    let values = random((sets * len).min((1 << 20) - 3));
    let values =
        |scale: f32| -> Vec<f32> { values.iter().map(|x| scale * x).cycle().take(sets * len).collect() };
    let (params, grads) = (gpu.device.upload(&values(0.02))?, gpu.device.upload(&values(1e-3))?);
    let (m, v) = (gpu.room::<f32>(sets, len)?, gpu.room::<f32>(sets, len)?);
    let (average, weights) = (gpu.room::<f32>(sets, len)?, gpu.room::<bf16>(sets, len)?);
    let step = OptimizerStep {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        beta2_power: 0.8,
        eps: 1e-8,
        clip: 1.0,
        ema_decay: 0.9999,
        seed: 1,
        images: 0.0,
        continues: 0,
        unfinished: 0,
    };
    let step = gpu.device.upload(&[step])?;
    let state = gpu.device.zeros::<OptimizerState>(1)?;
    let workspace = gpu.room::<f64>(1, workspace_bytes(&arena, &gpu.device).div_ceil(8))?;
    let blocks = norm_blocks(kernels.info().multiprocessors, len);
    let update = |set: usize, full: bool| UpdateParams {
        params: params.ptr().offset(set * len),
        grads: grads.ptr().offset(set * len),
        m: m.ptr(set),
        v: v.ptr(set),
        weights: weights.ptr(set),
        average: if full { average.ptr(set) } else { Ptr::null() },
        tensors: tables.tensors.ptr(),
        chunks: tables.chunks.ptr(),
        step: step.ptr(),
        state: state.ptr(),
        partial: workspace.ptr(0),
        rates: workspace.ptr(0).offset(2 * chunks).cast(),
        squares: Ptr::null(),
        stochastic: i32::from(full),
        ranks: 0,
        wholes: arena.wholes() as i32,
        nesterov: 0,
    };
    let norm = |stream: &Stream, set: usize| {
        let params = NormParams {
            grads: grads.ptr().offset(set * len),
            partial: workspace.ptr(0),
            step: step.ptr(),
            state: state.ptr(),
            size: len as i64,
            blocks: blocks as i32,
            unused: 0,
        };
        // SAFETY: every operand lies in a live buffer of the size that the arena asks for.
        unsafe { launch_norm(kernels, stream.raw(), &params) }
    };
    // SAFETY: as above.
    let adamw = |full: bool| {
        move |stream: &Stream, set: usize| unsafe {
            launch_adamw(kernels, stream.raw(), chunks, &update(set, full))
        }
    };
    // SAFETY: as above.
    let lamb = |stream: &Stream, set: usize| unsafe {
        launch_lamb(kernels, stream.raw(), chunks, arena.tensors().len(), &update(set, false))
    };
    // SAFETY: as above.
    let sgd = |stream: &Stream, set: usize| unsafe {
        launch_sgd(kernels, stream.raw(), chunks, &UpdateParams { v: Ptr::null(), ..update(set, false) })
    };
    let (wholes, lines) = statistics(&specs(width, depth), width);
    let statistics = Statistics::new(&arena, &lines, &wholes)?;
    let statistic_tables = statistics.upload(&gpu.device)?;
    let (half, second) = (gpu.room::<bf16>(sets, len)?, gpu.room::<f32>(sets, statistics.len())?);
    let adafactor = |stream: &Stream, set: usize| {
        let update = UpdateParams { m: Ptr::null(), v: Ptr::null(), ..update(set, false) };
        let (params, blocks) = statistic_tables.params(update, half.ptr(set), second.ptr(set), &arena);
        // SAFETY: as above; the tables are those of the arena.
        unsafe {
            launch_adafactor_sums(kernels, stream.raw(), blocks, &params)?;
            launch_adafactor_of(kernels, stream.raw(), blocks, &params)
        }
    };
    let zero = |stream: &Stream, set: usize| {
        let params = ZeroParams { out: average.ptr(set), step: Ptr::null(), size: len as i64 };
        // SAFETY: as above.
        unsafe { launch_zero(kernels, stream.raw(), &params) }
    };
    let cast = |stream: &Stream, set: usize| {
        let x = params.ptr().offset(set * len);
        let (step, state) = (Ptr::null(), Ptr::null());
        let params = CastParams { out: weights.ptr(set), x, step, state, size: len as i64 };
        // SAFETY: as above.
        unsafe { launch_cast(kernels, stream.raw(), &params) }
    };
    let mut put = |kernel: &str, bytes: usize, launch: &Queue<'_>| {
        let case = Case {
            kernel: kernel.into(),
            shape: format!("{width}x{depth}"),
            operations: 0.0,
            bytes: (bytes * len) as f64,
            sets,
            launch,
        };
        sink(&case)
    };
    // The norm leaves the factors that the updates read.
    put("optim_norm", 4, &norm)?;
    put("optim_adamw", 30, &adamw(false))?;
    put("optim_adamw_average", 38, &adamw(true))?;
    put("optim_lamb", 42, &lamb)?;
    put("optim_sgd", 22, &sgd)?;
    put("optim_adafactor", 22, &adafactor)?;
    put("optim_zero", 4, &zero)?;
    put("optim_cast", 6, &cast)
}
