//! Checked launch of the rotary table.

use super::raw::{RopePair, RopeTableParams, launch_rope_table};
use crate::device::{Buffer, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{check_cu_seqlens, check_extents, check_len, check_wide};
use crate::ops::{RopeConfig, RopeCoordinate};

/// The table of the rotary position embedding of a recipe for batches of one size.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    config: RopeConfig,
    tokens: usize,
    images: usize,
    head_dim: usize,
}

/// Operands of the launch.
#[derive(Clone, Copy)]
pub struct RopeOperands<'a> {
    /// `[T, 2]` as in a packed batch.
    pub positions: &'a Buffer<u16>,
    /// `[N, 2]`.
    pub grids: &'a Buffer<u16>,
    /// `[N + 1]`.
    pub cu_seqlens: &'a Buffer<i32>,
    /// The same on the host.
    pub cu_seqlens_host: &'a [i32],
    /// Those of [`RopeTable::pairs`].
    pub pairs: &'a Buffer<RopePair>,
    /// `[T, head_dim / 2, 2]`, all rows written: cos and sin; 1 and 0 at prefix tokens and after the last image.
    pub out: &'a Buffer<f32>,
}

impl RopeTable {
    /// The table for heads of `head_dim` columns and batches of `tokens` rows and `images` slots.
    ///
    /// # Errors
    /// A head dim that 4 does not divide; sizes beyond what the kernel counts with.
    pub fn new(config: &RopeConfig, tokens: usize, images: usize, head_dim: usize) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(4) {
            return Err(Error::usage(format!(
                "the rotary table has a head dim of {head_dim}, expected a multiple of 4"
            )));
        }
        check_extents("rotary table", &[tokens, images, tokens.saturating_mul(head_dim)])?;
        Ok(Self { config: config.clone(), tokens, images, head_dim })
    }

    /// The pairs of columns of a head.
    pub fn pairs(&self) -> Vec<RopePair> {
        let pair = |pair: crate::ops::RopePair| {
            let turns = pair.turns as f32;
            let rest = (pair.turns - f64::from(turns)) as f32;
            RopePair { turns, rest, axis: pair.axis as i32, unused: 0 }
        };
        self.config.pairs(self.head_dim).into_iter().map(pair).collect()
    }

    /// Queues the table.
    ///
    /// # Errors
    /// Sizes that do not fit together, `cu_seqlens` decreasing or overrunning, a launch that the device refuses.
    pub fn launch(&self, stream: &Stream, operands: &RopeOperands<'_>) -> Result<()> {
        let Self { config, tokens, images, head_dim } = self;
        check_cu_seqlens(operands.cu_seqlens_host, *images, *tokens)?;
        let params = RopeTableParams {
            out: check_wide("the rotary table", operands.out, &[*tokens, *head_dim])?,
            positions: check_len("positions", operands.positions, &[*tokens, 2])?,
            grids: check_len("grids", operands.grids, &[*images, 2])?,
            cu_seqlens: check_len("cu_seqlens", operands.cu_seqlens, &[*images + 1])?,
            pair: check_wide("pairs of the rotary table", operands.pairs, &[head_dim / 2])?,
            tokens: *tokens as i32,
            images: *images as i32,
            pairs: (head_dim / 2) as i32,
            coordinate: match config.coordinate {
                RopeCoordinate::Absolute => 0,
                RopeCoordinate::Fractional => 1,
                RopeCoordinate::Centered => 2,
                RopeCoordinate::CenteredLonger => 3,
                RopeCoordinate::CenteredShorter => 4,
                RopeCoordinate::Ends => 5,
            },
            offset: config.offset as f32,
            unused: 0,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_rope_table(stream.device().kernels(), stream.raw(), &params) }
    }
}
