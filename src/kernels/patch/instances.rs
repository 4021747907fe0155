//! What the kernels of patches are instantiated for. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// The kernel that normalises u8 (or f32) patches whose rows begin at multiples of `bytes`.
pub fn normalise_name(u8_pixels: bool, bytes: usize) -> String {
    format!("patch_normalise_{}_{bytes}", if u8_pixels { "u8" } else { "f32" })
}

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let kernel = |name: String, body: String, params, min_blocks| Kernel {
        name,
        body,
        params,
        threads: THREADS,
        min_blocks,
        tensor_cores: false,
    };
    let normalise = [(true, 8), (true, 4), (true, 1), (false, 16), (false, 4)].map(|(pixels, bytes)| {
        let body = format!("patch::normalise<{pixels}, {bytes}>");
        kernel(normalise_name(pixels, bytes), body, "PatchNormalise", 4)
    });
    let prefix = ["write", "grad"]
        .map(|op| kernel(format!("patch_prefix_{op}_bf16"), format!("patch::prefix_{op}"), "PatchPrefix", 4));
    let source = |file, kernels: &[Kernel]| Source { file, tier: Tier::Sm80, kernels: kernels.to_vec() };
    vec![source("patch/sm80_patch_normalise.cu", &normalise), source("patch/sm80_patch_prefix.cu", &prefix)]
}
