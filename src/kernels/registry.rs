//! Every kernel there is: what the build instantiates, and what the compiled code must keep to.
//!
//! `build.rs` includes this file, so it stands on `std` alone. For each [`Source`] the build writes a
//! translation unit that includes the `.cu` file and one `TRENCADIS_KERNEL` line per [`Kernel`], once for
//! nvcc and once for the emulator.

#[path = "attention/instances.rs"]
pub mod attention;
#[path = "collective/instances.rs"]
pub mod collective;
#[path = "contrastive/instances.rs"]
pub mod contrastive;
#[path = "elementwise/instances.rs"]
pub mod elementwise;
#[path = "gemm/tiles.rs"]
pub mod gemm;
#[path = "loss/instances.rs"]
pub mod loss;
#[path = "measure/instances.rs"]
pub mod measure;
#[path = "norm/instances.rs"]
pub mod norm;
#[path = "optim/instances.rs"]
pub mod optim;
#[path = "patch/instances.rs"]
pub mod patch;
#[path = "pool/instances.rs"]
pub mod pool;
#[path = "position/instances.rs"]
pub mod position;
#[path = "residual/instances.rs"]
pub mod residual;
#[path = "view/instances.rs"]
pub mod view;

/// Which GPUs a source is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Every GPU since Ampere: SASS for sm_80 and sm_90, PTX of compute_80 for what comes later.
    Sm80,
    /// Hopper: SASS for sm_90a alone, which no other GPU runs.
    Sm90,
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
    [
        gemm::sources(),
        attention::sources(),
        pool::sources(),
        loss::sources(),
        contrastive::sources(),
        optim::sources(),
        norm::sources(),
        residual::sources(),
        patch::sources(),
        view::sources(),
        position::sources(),
        elementwise::sources(),
        collective::sources(),
        measure::sources(),
    ]
    .concat()
}
