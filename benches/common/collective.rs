//! Cases of the sum of ranks that share a device.

use half::bf16;
use trencadis::Result;
use trencadis::device::{Ptr, Stream};
use trencadis::kernels::collective::{SumRanksParams, launch_sum_ranks};

use super::gpu::{Case, Gpu, Sink};

/// A block of ViT-B in f32, and rows of activations in bf16, of eight ranks.
const SHAPES: [(usize, usize); 2] = [(8, 7_087_872), (8, 4096 * 768)];

/// Hands every case to `sink`.
///
/// # Errors
/// A device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    SHAPES.into_iter().try_for_each(|(ranks, len)| shape_cases(gpu, ranks, len, sink))
}

/// The cases of a part of `len` elements that each of `ranks` ranks sums.
///
/// # Errors
/// A device that fails.
pub fn shape_cases(gpu: &Gpu, ranks: usize, len: usize, sink: &mut Sink<'_>) -> Result<()> {
    let kernels = gpu.device.kernels();
    let len = (len / ranks).next_multiple_of(8);
    let shape = format!("{ranks}x{len}");
    let mut put = |kernel: &str, width: usize, sets: usize, launch: &super::gpu::Queue<'_>| {
        let (kernel, shape, bytes) =
            (format!("collective_{kernel}"), shape.clone(), width * (ranks + 1) * len);
        sink(&Case { kernel, shape, operations: 0.0, bytes: bytes as f64, sets, launch })
    };
    let sets = gpu.sets(4 * (ranks + 1) * len);
    let (own, out) = (ranks * len, gpu.room::<f32>(sets, len)?);
    let values: Vec<f32> = super::random(own.min(1 << 20)).into_iter().cycle().take(sets * own).collect();
    let parts = gpu.device.upload(&values)?;
    let wide = |stream: &Stream, set: usize| {
        let part = |rank: usize| parts.ptr().offset(set * own + rank * len);
        let parts: Vec<Ptr<f32>> = (0..ranks).map(part).collect();
        let params = SumRanksParams::new(out.ptr(set), &parts, len);
        // SAFETY: every part lies in a live buffer of the size that the shape asks for.
        unsafe { launch_sum_ranks(kernels, stream.raw(), &params) }
    };
    put("sum_f32", size_of::<f32>(), sets, &wide)?;
    let sets = gpu.sets(2 * (ranks + 1) * len);
    let (parts, out) = (gpu.random(sets, ranks * len)?, gpu.room::<bf16>(sets, len)?);
    let narrow = |stream: &Stream, set: usize| {
        let parts: Vec<Ptr<bf16>> = (0..ranks).map(|rank| parts.ptr(set).offset(rank * len)).collect();
        let params = SumRanksParams::new(out.ptr(set), &parts, len);
        // SAFETY: as above.
        unsafe { launch_sum_ranks(kernels, stream.raw(), &params) }
    };
    put("sum_bf16", size_of::<bf16>(), sets, &narrow)
}
