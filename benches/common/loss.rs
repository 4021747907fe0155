//! Cases of the loss kernels.

use trencadis::device::{Ptr, Stream};
use trencadis::kernels::loss::{LossParams, Precision, launch};
use trencadis::recipe::LossKind;
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Sink};
use super::shapes::{Shape, own};

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    let usual = [(1024, 10), (1024, 1000), (16_384, 1000), (1024, 21_843), (1024, 29_593)];
    let usual = usual.map(|(images, classes)| Shape::Loss { images, classes });
    for shape in own().map_err(Error::usage)?.unwrap_or(usual.into()) {
        if let Shape::Loss { images, classes } = shape {
            shape_cases(gpu, images, classes, sink)?;
        }
    }
    Ok(())
}

/// The cases of one shape: logits in bf16, classes and soft targets.
///
/// # Errors
/// A shape that the kernels do not take, a device that fails.
pub fn shape_cases(gpu: &Gpu, images: usize, classes: usize, sink: &mut Sink<'_>) -> Result<()> {
    let kernels = gpu.device.kernels();
    let stride = classes.next_multiple_of(8);
    // Bytes of logits and gradient.
    let bytes = 4 * images * stride;
    let sets = gpu.sets(bytes);
    let logits = gpu.random(sets, images * stride)?;
    let dlogits = gpu.room(sets, images * stride)?;
    let labels: Vec<i32> = (0..images).map(|i| (i * 7 % classes) as i32).collect();
    let labels = gpu.device.upload(&labels)?;
    let weights = gpu.device.upload(&vec![1f32; images])?;
    let soft = gpu.room::<f32>(sets, images * classes)?;
    let (loss, rank) = (gpu.room::<f32>(1, images)?, gpu.room::<i32>(1, images)?);
    for (kind, name) in [(LossKind::Softmax, "softmax"), (LossKind::Sigmoid, "sigmoid")] {
        for is_soft in [false, true] {
            let launch = |stream: &Stream, set: usize| {
                let params = LossParams {
                    loss: loss.ptr(0),
                    dlogits: dlogits.ptr(set),
                    rank: rank.ptr(0),
                    logits: logits.ptr(set).cast(),
                    labels: if is_soft { Ptr::null() } else { labels.ptr() },
                    soft: if is_soft { soft.ptr(set) } else { Ptr::null() },
                    weights: weights.ptr(),
                    scale: Ptr::null(),
                    error: Ptr::null(),
                    logits_stride: stride as i64,
                    dlogits_stride: stride as i64,
                    kept: 0.9,
                    floor: 0.1 / classes as f32,
                    sharpness: 1.0,
                    unit: 1.0,
                    slope: 1.0,
                    images: images as i32,
                    classes: classes as i32,
                };
                // SAFETY: every operand lies in a live buffer of the size that the shape asks for.
                unsafe { launch(kernels, stream.raw(), kind, Precision::Bf16, &params) }
            };
            sink(&Case {
                kernel: format!("loss_{name}_{}", if is_soft { "soft" } else { "classes" }),
                shape: format!("{images}x{classes}"),
                operations: 0.0,
                bytes: (bytes + if is_soft { 4 * images * classes } else { 0 }) as f64,
                sets,
                launch: &launch,
            })?;
        }
    }
    Ok(())
}
