//! The kernels that measure a device. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let kernel = |op: &str, params, min_blocks, tensor_cores| Kernel {
        name: format!("measure_{op}_bf16"),
        body: format!("measure::{op}"),
        params,
        threads: THREADS,
        min_blocks,
        tensor_cores,
    };
    vec![Source {
        file: "measure/sm80_measure.cu",
        tier: Tier::Sm80,
        kernels: vec![kernel("copy", "MeasureCopy", 4, false), kernel("mma", "MeasureMma", 2, true)],
    }]
}
