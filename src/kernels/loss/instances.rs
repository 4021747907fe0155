//! What the loss kernels are instantiated for. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Most classes of a kernel, its threads, the 8 columns that a thread holds so many times, and the blocks of a
/// multiprocessor. The first is for rows of one tile; the second goes over any row, tile by tile, up to what the
/// kernels count exactly in f32.
pub const VARIANTS: [(usize, u32, u32, u32); 2] = [(1024, 128, 1, 8), (1 << 24, 512, 2, 2)];

/// The kernel of a loss (`softmax` or `sigmoid`) of logits of a type (`bf16` or `f32`).
pub fn name(loss: &str, dtype: &str, widest: usize) -> String {
    let rows = if widest == VARIANTS[0].0 { "short" } else { "long" };
    format!("loss_{loss}_{dtype}_{rows}")
}

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let mut kernels = Vec::new();
    for loss in ["softmax", "sigmoid"] {
        for (dtype, element) in [("bf16", "bf16"), ("f32", "float")] {
            kernels.extend(VARIANTS.map(|(widest, threads, chunks, min_blocks)| Kernel {
                name: name(loss, dtype, widest),
                body: format!("loss::cross_entropy<loss::{loss}, {element}, {threads}, {chunks}>"),
                params: "LossParams",
                threads,
                min_blocks,
                tensor_cores: false,
            }));
        }
    }
    vec![Source { file: "loss/sm80_loss.cu", tier: Tier::Sm80, kernels }]
}
