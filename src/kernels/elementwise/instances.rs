//! The kernels of elementwise sums and GELU. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// The source of this family.
pub fn sources() -> Vec<Source> {
    let kernel = |name: &str, body: &str, params| Kernel {
        name: name.into(),
        body: format!("elementwise::{body}"),
        params,
        threads: THREADS,
        min_blocks: 4,
        tensor_cores: false,
    };
    vec![Source {
        file: "elementwise/sm80_elementwise.cu",
        tier: Tier::Sm80,
        kernels: vec![
            kernel("elementwise_add_bf16", "add<false>", "ElementwiseAdd"),
            kernel("elementwise_add_row_bf16", "add<true>", "ElementwiseAdd"),
            kernel("elementwise_gelu_bf16", "gelu", "ElementwiseGelu"),
            kernel("elementwise_accumulate_f32", "accumulate", "ElementwiseAccumulate"),
            kernel("elementwise_accumulate_single_f32", "accumulate_single", "ElementwiseAccumulateSingle"),
        ],
    }]
}
