//! What the kernels of views are instantiated for. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// The kernel `op` (`resize`, `mean`, `patches`) for pictures of so many channels, 1 or 3.
pub fn name(op: &str, channels: usize) -> String {
    format!("view_{op}_u8_{channels}")
}

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let kernels = |op: &str, params| {
        [1, 3].map(|channels| Kernel {
            name: name(op, channels),
            body: format!("view::{op}<{channels}>"),
            params,
            threads: THREADS,
            min_blocks: 4,
            tensor_cores: false,
        })
    };
    let resize = kernels("resize", "ViewResize").to_vec();
    let patches = [kernels("mean", "ViewPatches"), kernels("patches", "ViewPatches")].concat();
    let source = |file, kernels| Source { file, tier: Tier::Sm80, kernels };
    vec![source("view/sm80_view_resize.cu", resize), source("view/sm80_view_patches.cu", patches)]
}
