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

/// How the two warpgroups that multiply share the tiles of a block, on Hopper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Each has half the rows of every tile.
    Cooperative,
    /// Each has every other tile: one writes its result while the other multiplies.
    PingPong,
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
    /// Rows of a warp's part; of a warpgroup's on Hopper.
    pub warp_m: u32,
    /// Columns of it.
    pub warp_n: u32,
    /// Blocks of a multiprocessor that registers are spared for.
    pub blocks: u32,
    /// How Hopper's own kernel computes it; none for the kernel of every GPU.
    pub hopper: Option<Scheme>,
}

const fn tile(m: u32, n: u32, k: u32, warp: u32, blocks: u32) -> Tile {
    Tile { m, n, k, warp_m: warp, warp_n: warp, blocks, hopper: None }
}

const fn hopper(m: u32, n: u32, scheme: Scheme) -> Tile {
    let warp_m = match scheme {
        Scheme::Cooperative => m / 2,
        Scheme::PingPong => m,
    };
    Tile { m, n, k: 64, warp_m, warp_n: n, blocks: 1, hopper: Some(scheme) }
}

/// Every tile of Hopper's kernel: more columns where the accumulators of half a tile fit a thread, fewer where the
/// other warpgroup is to write meanwhile. 160 and 208 divide widths that 128, 192 and 256 do not.
pub const HOPPER_TILES: [Tile; 6] = [
    hopper(128, 256, Scheme::Cooperative),
    hopper(256, 128, Scheme::Cooperative),
    hopper(128, 208, Scheme::Cooperative),
    hopper(128, 192, Scheme::PingPong),
    hopper(128, 160, Scheme::PingPong),
    hopper(128, 128, Scheme::PingPong),
];

/// Threads of a block of Hopper's kernel: a warpgroup that copies and two that multiply.
pub const HOPPER_THREADS: u32 = 384;

/// Shared memory of such a block, `SHARED_BYTES` of the kernel: a KiB less than there is.
pub const HOPPER_SHARED_BYTES: u32 = 231_424;

/// Every tile. Stages of 32 are for GPUs whose shared memory does not hold enough stages of 64.
pub const TILES: [Tile; 5] = [
    tile(128, 256, 64, 64, 1),
    tile(128, 256, 32, 64, 1),
    tile(128, 128, 64, 64, 2),
    tile(128, 128, 32, 64, 2),
    tile(64, 64, 64, 32, 4),
];

/// Tiles of products whose rows come or go in chunks: the largest, those beside which a result is written while the next
/// is multiplied, those of every GPU, and small ones for short chunks.
pub const SHARDED_TILES: [Tile; 5] = [HOPPER_TILES[0], HOPPER_TILES[3], HOPPER_TILES[5], TILES[2], TILES[4]];

/// Most chunks of such a product, `GEMM_MOST_CHUNKS` of the kernels.
pub const MOST_CHUNKS: usize = 64;

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
        match self.hopper {
            None => 32 * (self.m / self.warp_m) * (self.n / self.warp_n),
            Some(_) => HOPPER_THREADS,
        }
    }

    /// Whether there is a kernel that makes this of a product. On Hopper long epilogues have the tiles that hide them,
    /// and sums, which have few tiles and long k, the largest.
    pub fn has(self, kind: Kind) -> bool {
        match (self.hopper, kind) {
            (None, _) | (_, Kind::Store) => true,
            (Some(scheme), Kind::GeluGrad) => scheme == Scheme::PingPong,
            (Some(_), Kind::Sum) => matches!((self.m, self.n), (128, 256) | (256, 128) | (128, 128)),
        }
    }

    /// Whether there is a kernel that makes this of a product whose rows come or go in chunks.
    pub fn has_sharded(self, layout: Layout, kind: Kind) -> bool {
        layout != Layout::Tn && kind != Kind::GeluGrad && self.has(kind) && SHARDED_TILES.contains(&self)
    }

    /// Warps that write a tile.
    pub const fn writers(self) -> u32 {
        match self.hopper {
            None => self.threads() / 32,
            Some(Scheme::Cooperative) => 8,
            Some(Scheme::PingPong) => 4,
        }
    }

    /// Whether the blocks of a cluster share the first operand, and lie next to each other along n; else they share
    /// the second.
    pub const fn shares_a(self) -> bool {
        self.m > self.n
    }

    /// Shared memory of a stage: both operands.
    pub const fn stage_bytes(self) -> u32 {
        2 * self.k * (self.m + self.n)
    }
}

/// Symbol of a kernel.
pub fn name(layout: Layout, kind: Kind, tile: Tile) -> String {
    let Tile { m, n, k, .. } = tile;
    let scheme = match tile.hopper {
        None => "",
        Some(Scheme::Cooperative) => "_hopper",
        Some(Scheme::PingPong) => "_hopper_pingpong",
    };
    format!("gemm_bf16_{}_{}_{m}x{n}x{k}{scheme}", layout.names().0, kind.names().0)
}

/// Symbol of a kernel whose rows come or go in chunks.
pub fn sharded_name(layout: Layout, kind: Kind, tile: Tile) -> String {
    name(layout, kind, tile).replacen("gemm_", "gemm_sharded_", 1)
}

/// The kernel of a tile whose rows come or go in chunks.
fn sharded_kernel(layout: Layout, kind: Kind, tile: Tile) -> Kernel {
    let whole = kernel(layout, kind, tile);
    Kernel {
        name: sharded_name(layout, kind, tile),
        body: whole.body.replacen("gemm<", "gemm_sharded<", 1),
        params: if tile.hopper.is_some() { "HopperGemmShardedParams" } else { "GemmShardedParams" },
        ..whole
    }
}

fn kernel(layout: Layout, kind: Kind, tile: Tile) -> Kernel {
    let Tile { m, n, k, warp_m, warp_n, blocks, .. } = tile;
    let (layout_name, kind_name) = (layout.names().1, kind.names().1);
    let (body, params) = match tile.hopper {
        None => (
            format!("gemm<GemmLayout::{layout_name}, {m}, {n}, {k}, {warp_m}, {warp_n}, {kind_name}>"),
            "GemmParams",
        ),
        Some(scheme) => (
            format!(
                "hopper_gemm<GemmLayout::{layout_name}, {m}, {n}, {}, {kind_name}>",
                scheme == Scheme::PingPong
            ),
            "HopperGemmParams",
        ),
    };
    Kernel {
        name: name(layout, kind, tile),
        body,
        params,
        threads: tile.threads(),
        min_blocks: blocks,
        tensor_cores: true,
    }
}

/// Every kernel of these tiles, whole and sharded.
fn kernels(tiles: &[Tile]) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for &tile in tiles {
        for layout in Layout::ALL {
            for kind in Kind::ALL.into_iter().filter(|&kind| tile.has(kind)) {
                kernels.push(kernel(layout, kind, tile));
                if tile.has_sharded(layout, kind) {
                    kernels.push(sharded_kernel(layout, kind, tile));
                }
            }
        }
    }
    kernels
}

/// The GEMM kernels, and the sums that end a reduction over blocks.
pub fn sources() -> Vec<Source> {
    let sum = |name: &str, body: &str, params| Kernel {
        name: name.into(),
        body: body.into(),
        params,
        threads: 256,
        min_blocks: 4,
        tensor_cores: false,
    };
    vec![
        Source { file: "gemm/sm80_gemm.cu", tier: Tier::Sm80, kernels: kernels(&TILES) },
        Source { file: "gemm/sm90_gemm.cu", tier: Tier::Sm90, kernels: kernels(&HOPPER_TILES) },
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
