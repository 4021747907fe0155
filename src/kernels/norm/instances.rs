//! What the norm kernels are instantiated for. Part of the registry, so it stands on `std` alone.

use super::{Kernel, Source, Tier};

/// Threads of a block of the forward pass.
pub const FORWARD_THREADS: u32 = 256;
/// Warps of the block that adds up 32 columns of partial sums.
pub const SUMS_WARPS: u32 = 16;

/// One kernel of the forward pass, for rows of up to `256 · chunks · warps` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Vectors of eight columns of a thread.
    pub chunks: u32,
    /// Rows of a group of warps.
    pub rows: u32,
    /// Warps that hold a row: 1, or those of the block.
    pub warps: u32,
    /// Blocks that must fit on a multiprocessor.
    pub min_blocks: u32,
}

/// One kernel of the backward pass, for rows of up to `256 · chunks · warps` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backward {
    /// Warps that hold a row.
    pub warps: u32,
    /// Groups of so many warps in a block.
    pub groups: u32,
    /// Vectors of eight columns of a thread.
    pub chunks: u32,
    /// Rows that a group has under way.
    pub rows: u32,
    /// Blocks that must fit on a multiprocessor, and that the grid has for each.
    pub min_blocks: u32,
}

const fn forward(chunks: u32, rows: u32, warps: u32, min_blocks: u32) -> Forward {
    Forward { chunks, rows, warps, min_blocks }
}

const fn backward(warps: u32, groups: u32, chunks: u32, rows: u32, min_blocks: u32) -> Backward {
    Backward { warps, groups, chunks, rows, min_blocks }
}

/// Kernels of the forward pass, narrow rows first.
pub const FORWARD: [Forward; 10] = [
    forward(1, 4, 1, 4),
    forward(2, 2, 1, 4),
    forward(3, 2, 1, 3),
    forward(4, 1, 1, 4),
    forward(5, 1, 1, 3),
    forward(6, 1, 1, 3),
    forward(7, 1, 1, 2),
    forward(8, 1, 1, 2),
    forward(2, 1, 8, 4),
    forward(4, 1, 8, 4),
];

/// Kernels of the backward pass, narrow rows first. About 128 registers of each thread hold rows under way and three
/// sums for every column, so 512 threads fill a multiprocessor: one block, and so one row of partial sums, each.
pub const BACKWARD: [Backward; 11] = [
    backward(1, 16, 1, 2, 1),
    backward(2, 8, 1, 2, 1),
    backward(3, 5, 1, 2, 1),
    backward(4, 4, 1, 2, 1),
    backward(5, 3, 1, 2, 1),
    backward(6, 2, 1, 2, 1),
    backward(7, 2, 1, 2, 1),
    backward(8, 2, 1, 2, 1),
    backward(16, 1, 1, 2, 1),
    backward(12, 1, 2, 1, 1),
    backward(16, 1, 2, 1, 1),
];

impl Forward {
    /// Widest row.
    pub const fn widest(&self) -> usize {
        (256 * self.chunks * self.warps) as usize
    }

    /// Rows of a block.
    pub const fn rows_of_block(&self) -> usize {
        (FORWARD_THREADS / 32 / self.warps * self.rows) as usize
    }

    /// Dynamic shared memory of a block.
    pub const fn shared_bytes(&self) -> u32 {
        if self.warps == 1 { 0 } else { 4 * 2 * self.rows * self.warps }
    }

    /// Symbol.
    pub fn name(&self) -> String {
        format!("norm_forward_bf16_{}", self.widest())
    }
}

impl Backward {
    /// Widest row.
    pub const fn widest(&self) -> usize {
        (256 * self.chunks * self.warps) as usize
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        32 * self.warps * self.groups
    }

    /// Rows that a block has under way.
    pub const fn rows_of_block(&self) -> usize {
        (self.groups * self.rows) as usize
    }

    /// Dynamic shared memory of a block: sums over rows, and the groups' sums over columns.
    pub const fn shared_bytes(&self) -> u32 {
        let staging = if self.groups == 1 { 0 } else { 256 * self.warps * self.chunks };
        4 * self.groups * (4 * self.rows * self.warps + staging)
    }

    /// Symbol.
    pub fn name(&self) -> String {
        format!("norm_backward_bf16_{}", self.widest())
    }
}

/// The sources of this family.
pub fn sources() -> Vec<Source> {
    let kernel = |name, body, params, threads, min_blocks| Kernel {
        name,
        body,
        params,
        threads,
        min_blocks,
        tensor_cores: false,
    };
    let forward = FORWARD.map(|k| {
        let body = format!("norms::forward<{}, {}, {}>", k.chunks, k.rows, k.warps);
        kernel(k.name(), body, "NormForward", FORWARD_THREADS, k.min_blocks)
    });
    let mut backward = Vec::from(BACKWARD.map(|k| {
        let body = format!("norms::backward<{}, {}, {}, {}>", k.warps, k.groups, k.chunks, k.rows);
        kernel(k.name(), body, "NormBackward", k.threads(), k.min_blocks)
    }));
    let sums = format!("norms::sums<{SUMS_WARPS}>");
    backward.push(kernel("norm_sums_f32".into(), sums, "NormSums", 32 * SUMS_WARPS, 2));
    let source = |file, kernels| Source { file, tier: Tier::Sm80, kernels };
    vec![source("norm/sm80_norm.cu", forward.to_vec()), source("norm/sm80_norm_backward.cu", backward)]
}
