//! What the GEMM kernels are instantiated for. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// How the operands lie in memory. Both are row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `A[m, k]`, `B[n, k]`: `y = x wᵀ`.
    Nt,
    /// `A[m, k]`, `B[k, n]`: `dx = dy w`.
    Nn,
    /// `A[k, m]`, `B[k, n]`: `dw = dyᵀ x`.
    Tn,
}

/// What is made of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// bf16, with bias, GELU and residual where they are asked for.
    Store,
    /// bf16, times the slope of GELU, with column sums.
    GeluGrad,
    /// f32, added to what is there or written over it, in slices of k where that fills the device.
    Sum,
}

/// Part of the result that a block computes, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Rows of the result.
    pub m: u32,
    /// Columns of the result.
    pub n: u32,
    /// Elements of k in a stage.
    pub k: u32,
    /// Rows of a warp's part.
    pub warp_m: u32,
    /// Columns of a warp's part.
    pub warp_n: u32,
    /// Blocks of a multiprocessor that registers are spared for.
    pub blocks: u32,
}

const fn tile(m: u32, n: u32, k: u32, warp: u32, blocks: u32) -> Tile {
    Tile { m, n, k, warp_m: warp, warp_n: warp, blocks }
}

/// Every tile. Stages of 32 are for GPUs whose shared memory does not hold enough stages of 64.
pub const TILES: [Tile; 5] = [
    tile(128, 256, 64, 64, 1),
    tile(128, 256, 32, 64, 1),
    tile(128, 128, 64, 64, 2),
    tile(128, 128, 32, 64, 2),
    tile(64, 64, 64, 32, 4),
];

/// Fewest stages of the ring in shared memory.
pub const MIN_STAGES: u32 = 3;

/// Most stages.
pub const MAX_STAGES: u32 = 6;

impl Layout {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Nt, Self::Nn, Self::Tn];

    const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Nt => ("nt", "NT"),
            Self::Nn => ("nn", "NN"),
            Self::Tn => ("tn", "TN"),
        }
    }
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Store, Self::GeluGrad, Self::Sum];

    const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Store => ("store", "GemmStore"),
            Self::GeluGrad => ("gelugrad", "GemmGeluGrad"),
            Self::Sum => ("sum", "GemmSum"),
        }
    }
}

impl Tile {
    /// Threads of a block.
    pub const fn threads(self) -> u32 {
        32 * (self.m / self.warp_m) * (self.n / self.warp_n)
    }

    /// Shared memory of a stage: both operands.
    pub const fn stage_bytes(self) -> u32 {
        2 * self.k * (self.m + self.n)
    }
}

/// Symbol of a kernel.
pub fn name(layout: Layout, kind: Kind, tile: Tile) -> String {
    let Tile { m, n, k, .. } = tile;
    format!("gemm_bf16_{}_{}_{m}x{n}x{k}", layout.names().0, kind.names().0)
}

/// The GEMM kernels, and the sums that end a reduction over blocks.
pub fn sources() -> Vec<Source> {
    let mut kernels = Vec::new();
    for tile in TILES {
        for layout in Layout::ALL {
            for kind in Kind::ALL {
                let Tile { m, n, k, warp_m, warp_n, blocks } = tile;
                let (layout_name, kind_name) = (layout.names().1, kind.names().1);
                kernels.push(Kernel {
                    name: name(layout, kind, tile),
                    body: format!(
                        "gemm<GemmLayout::{layout_name}, {m}, {n}, {k}, {warp_m}, {warp_n}, {kind_name}>"
                    ),
                    params: "GemmParams",
                    threads: tile.threads(),
                    min_blocks: blocks,
                    tensor_cores: true,
                });
            }
        }
    }
    let sum = |name: &str, body: &str, params| Kernel {
        name: name.into(),
        body: body.into(),
        params,
        threads: 256,
        min_blocks: 4,
        tensor_cores: false,
    };
    vec![
        Source { file: "gemm/sm80_gemm.cu", tier: Tier::Sm80, kernels },
        Source {
            file: "gemm/sm80_reduce.cu",
            tier: Tier::Sm80,
            kernels: vec![
                sum("sum_f32_slices", "sum_slices", "SumSlicesParams"),
                sum("sum_f32_rows", "sum_rows<8>", "SumRowsParams"),
                sum("bias_grad_bf16", "bias_grad<8>", "BiasGradParams"),
            ],
        },
    ]
}
