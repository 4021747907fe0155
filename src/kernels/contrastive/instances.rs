//! What the contrastive kernels are instantiated for. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block that compares vectors.
pub const THREADS: u32 = 128;
/// Threads of a block whose warps have a row each, or whose threads have a pair each.
pub const ROW_THREADS: u32 = 256;

/// The kernel that does `op` for a loss, `softmax` or `sigmoid`.
pub fn name(op: &str, loss: &str) -> String {
    format!("contrastive_{op}_bf16_{loss}")
}

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let kernel = |name: String, body: String, threads, min_blocks, tensor_cores| Kernel {
        name,
        body,
        params: "ContrastiveParams",
        threads,
        min_blocks,
        tensor_cores,
    };
    let rows = |op: &str| {
        let (name, body) = (format!("contrastive_{op}_bf16"), format!("contrastive::{op}"));
        kernel(name, body, ROW_THREADS, 4, false)
    };
    let mut kernels = vec![rows("prepare"), rows("finish")];
    for loss in ["softmax", "sigmoid"] {
        let of = |op: &str, threads, min_blocks, tensor_cores| {
            let body = format!("contrastive::{op}<contrastive::{loss}>");
            kernel(name(op, loss), body, threads, min_blocks, tensor_cores)
        };
        kernels.push(of("statistics", THREADS, 3, true));
        kernels.push(of("losses", ROW_THREADS, 4, false));
        kernels.push(of("gradient", THREADS, 2, true));
    }
    vec![Source { file: "contrastive/sm80_contrastive.cu", tier: Tier::Sm80, kernels }]
}
