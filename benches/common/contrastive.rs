//! Cases of the contrastive kernels.

use trencadis::device::Stream;
use trencadis::kernels::contrastive::{Contrastive, Operands};
use trencadis::recipe::ContrastiveKind::{Sigmoid, Softmax};
use trencadis::{Error, Result};

use super::gpu::{Case, Gpu, Sink};
use super::shapes::{Shape, own};

/// Pairs of a batch and widths of their vectors.
pub const USUAL: [(usize, usize); 4] = [(1024, 512), (1024, 1024), (4096, 768), (16_384, 768)];

/// Hands every case to `sink`.
///
/// # Errors
/// Shapes that cannot be read, a device that fails.
pub fn cases(gpu: &Gpu, sink: &mut Sink<'_>) -> Result<()> {
    let usual = USUAL.map(|(pairs, width)| Shape::Contrastive { pairs, width });
    for shape in own().map_err(Error::usage)?.unwrap_or(usual.into()) {
        if let Shape::Contrastive { pairs, width } = shape {
            shape_cases(gpu, pairs, width, sink)?;
        }
    }
    Ok(())
}

/// The cases of one shape: both losses with all gradients. Operations are those of the scores and of the two products
/// of their gradient; that the kernels make the scores four times to hold none is their own affair.
///
/// # Errors
/// A shape that the kernels do not take, a device that fails.
pub fn shape_cases(gpu: &Gpu, pairs: usize, width: usize, sink: &mut Sink<'_>) -> Result<()> {
    let sets = gpu.sets(8 * pairs * width);
    let [images, texts] = [gpu.random(sets, pairs * width)?, gpu.random(sets, pairs * width)?];
    let [dimages, dtexts] = [gpu.room(sets, pairs * width)?, gpu.room(sets, pairs * width)?];
    let weights = gpu.device.upload(&vec![1f32; pairs])?;
    let (scale, bias) = (gpu.device.upload(&[3f32])?, gpu.device.upload(&[-3f32])?);
    let (per_pair, rank) = (gpu.device.alloc::<f32>(pairs)?, gpu.device.alloc::<i32>(pairs)?);
    let (dscale, dbias) = (gpu.device.alloc::<f32>(1)?, gpu.device.alloc::<f32>(1)?);
    for (kind, name) in [(Softmax, "softmax"), (Sigmoid, "sigmoid")] {
        let loss = Contrastive { kind, pairs, width };
        let workspace = gpu.device.alloc(loss.workspace()?.bytes())?;
        let biased = kind == Sigmoid;
        let launch = |stream: &Stream, set: usize| {
            let operands = Operands {
                images: images.rows(set, 0, width),
                texts: texts.rows(set, 0, width),
                weights: &weights,
                scale: &scale,
                bias: biased.then_some(&bias),
                loss_scale: None,
                per_pair: &per_pair,
                dimages: dimages.rows(set, 0, width),
                dtexts: dtexts.rows(set, 0, width),
                dscale: &dscale,
                dbias: biased.then_some(&dbias),
                rank: Some(&rank),
            };
            loss.launch(stream, &operands, &workspace)
        };
        sink(&Case {
            kernel: format!("contrastive_{name}"),
            shape: format!("{pairs}x{width}"),
            operations: 6.0 * (pairs * pairs * width) as f64,
            bytes: 0.0,
            sets,
            launch: &launch,
        })?;
    }
    Ok(())
}
