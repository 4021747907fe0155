//! The kernels of collectives. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let kernel = |name: &str, element: &str| Kernel {
        name: format!("collective_sum_ranks_{name}"),
        body: format!("collective::sum_ranks<{element}>"),
        params: "CollectiveSumRanks",
        threads: THREADS,
        min_blocks: 4,
        tensor_cores: false,
    };
    vec![Source {
        file: "collective/sm80_sum_ranks.cu",
        tier: Tier::Sm80,
        kernels: vec![kernel("f32", "float"), kernel("bf16", "bf16")],
    }]
}
