//! Every kernel there is: what the build instantiates, and what the compiled code must keep to.
//!
//! `build.rs` includes this file, so it stands on `std` alone. For each [`Source`] the build writes a
//! translation unit that includes the `.cu` file and one `TRENCADIS_KERNEL` line per [`Kernel`], once for
//! nvcc and once for the emulator.

#[path = "attention/instances.rs"]
pub mod attention;
#[path = "gemm/tiles.rs"]
pub mod gemm;

/// Which GPUs a source is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Every GPU since Ampere: SASS for sm_80 and sm_90, PTX of compute_80 for what comes later.
    Sm80,
}

/// One kernel of a source.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Symbol, `<op>_<dtype>_<variant>`.
    pub name: String,
    /// C++ `__device__` function, with its template arguments.
    pub body: String,
    /// C++ type of the constant arguments, passed by value.
    pub params: &'static str,
    /// Threads of a block, exactly.
    pub threads: u32,
    /// Blocks that must fit on a multiprocessor, as far as registers go.
    pub min_blocks: u32,
    /// Whether matrix instructions must be in the compiled code.
    pub tensor_cores: bool,
}

/// One `.cu` file, compiled to one fatbin.
#[derive(Clone, Debug)]
pub struct Source {
    /// Path below `kernels/`.
    pub file: &'static str,
    /// GPUs it is compiled for.
    pub tier: Tier,
    /// Its kernels.
    pub kernels: Vec<Kernel>,
}

impl Source {
    /// File name without folder and ending, such as `sm80_gemm`: the name of its fatbin.
    pub fn stem(&self) -> &'static str {
        let name = self.file.rsplit('/').next().unwrap_or(self.file);
        name.strip_suffix(".cu").unwrap_or(name)
    }
}

impl Kernel {
    /// Most registers a thread may use so that `min_blocks` blocks fit (65,536 a multiprocessor,
    /// given out in units of 8 a thread, 255 at most).
    pub fn register_limit(&self) -> u32 {
        (65_536 / (self.threads * self.min_blocks) / 8 * 8).min(255)
    }
}

/// All sources.
pub fn sources() -> Vec<Source> {
    [gemm::sources(), attention::sources(), pool(), measure()].concat()
}

fn measure() -> Vec<Source> {
    let kernel = |op: &str, params, min_blocks, tensor_cores| Kernel {
        name: format!("measure_{op}_bf16"),
        body: format!("measure::{op}"),
        params,
        threads: 256,
        min_blocks,
        tensor_cores,
    };
    vec![Source {
        file: "measure/sm80_measure.cu",
        tier: Tier::Sm80,
        kernels: vec![kernel("copy", "MeasureCopy", 4, false), kernel("mma", "MeasureMma", 2, true)],
    }]
}

fn pool() -> Vec<Source> {
    let kernel = |name: String, body: String, params, threads, min_blocks| Kernel {
        name,
        body,
        params,
        threads,
        min_blocks,
        tensor_cores: false,
    };
    // Lanes that hold a row, and the head dims they serve.
    let variants = [(8, 64), (16, 128), (32, 256)];
    let of_variants = |op: &str, params| {
        let kernels = variants.map(|(lanes, dim)| {
            let name = format!("pool_attention_{op}_bf16_{dim}");
            kernel(name, format!("pool::attention_{op}<{lanes}>"), params, 256, 2)
        });
        kernels.to_vec()
    };
    let one = |op: &str, dtype: &str, params, threads, min_blocks| {
        kernel(format!("pool_{op}_{dtype}"), format!("pool::{op}"), params, threads, min_blocks)
    };
    let mut forward = of_variants("forward", "PoolAttentionForward");
    forward.push(one("attention_combine", "bf16", "PoolAttentionForward", 256, 2));
    let mut backward = of_variants("backward", "PoolAttentionBackward");
    backward.push(one("attention_sum", "f32", "PoolAttentionBackward", 512, 2));
    backward.push(one("attention_finish", "f32", "PoolAttentionBackward", 512, 1));
    let mean = vec![
        one("mean_forward", "bf16", "PoolMeanForward", 256, 4),
        one("mean_combine", "bf16", "PoolMeanForward", 256, 4),
        one("mean_backward", "bf16", "PoolMeanBackward", 256, 4),
    ];
    let source = |file, kernels| Source { file, tier: Tier::Sm80, kernels };
    vec![
        source("pool/sm80_pool_attention.cu", forward),
        source("pool/sm80_pool_attention_backward.cu", backward),
        source("pool/sm80_pool_mean.cu", mean),
    ]
}
