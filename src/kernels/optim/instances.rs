//! The kernels of the optimiser. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let kernel = |name: &str, body: &str, params, min_blocks| Kernel {
        name: format!("optim_{name}_f32"),
        body: format!("optim::{body}"),
        params,
        threads: THREADS,
        min_blocks,
        tensor_cores: false,
    };
    let source = |file, kernels| Source { file, tier: Tier::Sm80, kernels };
    vec![
        source(
            "optim/sm80_optim.cu",
            vec![
                kernel("squares", "sum_squares", "OptimNorm", 4),
                kernel("rest_squares", "rest_squares", "OptimRest", 4),
                kernel("finish", "finish", "OptimNorm", 1),
                kernel("adamw", "adamw", "OptimUpdate", 4),
                kernel("sgd", "sgd", "OptimUpdate", 4),
                kernel("zero", "zero", "OptimZero", 4),
                kernel("add", "add", "OptimAdd", 4),
                kernel("cast", "cast", "OptimCast", 4),
            ],
        ),
        source(
            "optim/sm80_lamb.cu",
            vec![
                kernel("lamb_update", "lamb_update", "OptimUpdate", 4),
                kernel("lamb_squares", "lamb_squares", "OptimUpdate", 4),
                kernel("lamb_rates", "lamb_rates", "OptimUpdate", 4),
                kernel("lamb_apply", "lamb_apply", "OptimUpdate", 4),
            ],
        ),
        source(
            "optim/sm80_adafactor.cu",
            vec![
                kernel("adafactor_squares", "adafactor_squares", "OptimAdafactor", 4),
                kernel("adafactor_sums", "adafactor_sums", "OptimAdafactor", 4),
                kernel("adafactor_moments", "adafactor_moments", "OptimAdafactor", 4),
                kernel("adafactor_lines", "adafactor_lines", "OptimAdafactor", 4),
                kernel("adafactor_apply", "adafactor_apply", "OptimAdafactor", 4),
            ],
        ),
    ]
}
