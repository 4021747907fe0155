//! What the pooling kernels are instantiated for. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Threads of the block that turns sums into the gradients of the parameters.
pub const FINISH_THREADS: u32 = 512;

/// Widest head of a kernel of attention pooling, and the lanes that hold a row there, 8 elements each.
pub const VARIANTS: [(usize, u32); 3] = [(64, 8), (128, 16), (256, 32)];

/// The kernel of attention pooling that does `op` for heads up to `widest`.
pub fn attention_name(op: &str, widest: usize) -> String {
    format!("pool_attention_{op}_bf16_{widest}")
}

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let kernel = |name: String, body: String, params, threads, min_blocks| Kernel {
        name,
        body,
        params,
        threads,
        min_blocks,
        tensor_cores: false,
    };
    let of_variants = |op: &str, params| {
        let kernels = VARIANTS.map(|(widest, lanes)| {
            let body = format!("pool::attention_{op}<{lanes}>");
            kernel(attention_name(op, widest), body, params, THREADS, 2)
        });
        kernels.to_vec()
    };
    let one = |op: &str, dtype: &str, params, threads, min_blocks| {
        kernel(format!("pool_{op}_{dtype}"), format!("pool::{op}"), params, threads, min_blocks)
    };
    let mut forward = of_variants("forward", "PoolAttentionForward");
    forward.push(one("attention_combine", "bf16", "PoolAttentionForward", THREADS, 2));
    let mut backward = of_variants("backward", "PoolAttentionBackward");
    backward.push(one("attention_finish", "f32", "PoolAttentionBackward", FINISH_THREADS, 1));
    let mean = vec![
        one("mean_forward", "bf16", "PoolMeanForward", THREADS, 4),
        one("mean_combine", "bf16", "PoolMeanForward", THREADS, 4),
        one("mean_backward", "bf16", "PoolMeanBackward", THREADS, 4),
    ];
    let gather = vec![
        one("gather_forward", "bf16", "PoolGather", THREADS, 4),
        one("gather_backward", "bf16", "PoolGather", THREADS, 4),
    ];
    let source = |file, kernels| Source { file, tier: Tier::Sm80, kernels };
    vec![
        source("pool/sm80_pool_attention.cu", forward),
        source("pool/sm80_pool_attention_backward.cu", backward),
        source("pool/sm80_pool_mean.cu", mean),
        source("pool/sm80_pool_gather.cu", gather),
    ]
}
