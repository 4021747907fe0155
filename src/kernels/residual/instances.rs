//! The residual kernels. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block of the forward and backward pass.
pub const THREADS: u32 = 256;
/// Threads of a block that writes the factors of an image.
pub const KEEP_THREADS: u32 = 128;

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let kernel = |name: &str, body: &str, params, threads, min_blocks| Kernel {
        name: name.into(),
        body: format!("residual::{body}"),
        params,
        threads,
        min_blocks,
        tensor_cores: false,
    };
    vec![Source {
        file: "residual/sm80_residual.cu",
        tier: Tier::Sm80,
        kernels: vec![
            kernel("residual_forward_bf16", "forward", "ResidualForward", THREADS, 4),
            kernel("residual_backward_bf16", "backward", "ResidualBackward", THREADS, 3),
            kernel("drop_path_keep_f32", "drop_path_keep", "DropPathKeep", KEEP_THREADS, 8),
        ],
    }]
}
