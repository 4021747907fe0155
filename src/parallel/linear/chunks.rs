//! What goes round, and what of the weight and of the tokens it meets.

use std::ops::Range;

use super::{Layout, ShardedLinear};
use crate::cpu::gemm::{Mat, MatMut};
use crate::parallel::group::Group;
use crate::parallel::ring::{Direction, Sharding};

/// Rows `range` of a row-major matrix of `width` columns.
pub(super) fn rows<'a, R>(data: &'a [R], range: &Range<usize>, width: usize) -> Mat<'a, R> {
    Mat::new(&data[range.start * width..range.end * width], range.len(), width, width)
}

/// The same, to be written.
pub(super) fn rows_mut<'a, R>(data: &'a mut [R], range: &Range<usize>, width: usize) -> MatMut<'a, R> {
    MatMut::new(&mut data[range.start * width..range.end * width], range.len(), width, width)
}

/// Rows of a chunk.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub chunk: usize,
    pub rows: Range<usize>,
}

/// What goes round, and what of the weight and of the tokens it meets.
pub(super) struct Chunks {
    sharding: Sharding,
    layout: Layout,
    pub rank: usize,
    pub size: usize,
    /// Shape of a chunk.
    pub rows: usize,
    pub cols: usize,
    /// Shape of a rank's weight.
    weight: [usize; 2],
    pub directions: Vec<(Direction, Range<usize>)>,
}

impl Chunks {
    pub fn new(linear: &ShardedLinear, group: &Group, tokens: usize) -> Self {
        let [rows, cols] = linear.chunk_shape(tokens);
        Self {
            sharding: linear.sharding,
            layout: linear.layout,
            rank: group.rank(),
            size: group.size(),
            rows,
            cols,
            weight: linear.weight_shape(),
            directions: linear.rings.parts(rows),
        }
    }

    /// FLOPs of one product of a whole chunk with a weight block of `width` on its other side.
    pub fn flops(&self, width: usize) -> f64 {
        2.0 * self.rows as f64 * self.cols as f64 * width as f64
    }

    /// Tokens that a part is about, as rows of the activations that do not go round.
    pub fn token_rows(&self, part: &Part) -> Range<usize> {
        let first = match self.layout {
            Layout::Features => 0,
            Layout::Tokens => part.chunk * self.rows,
        };
        first + part.rows.start..first + part.rows.end
    }

    /// Whether a product is added to that of the steps before: all chunks are about the same tokens.
    pub fn accumulates(&self, step: usize) -> bool {
        self.layout == Layout::Features && step > 0
    }

    /// Offset and shape of the block of the weight that meets `chunk`.
    fn block_at(&self, chunk: usize) -> (usize, [usize; 2]) {
        let [rows, cols] = self.weight;
        match (self.layout, self.sharding) {
            (Layout::Tokens, _) => (0, [rows, cols]),
            (Layout::Features, Sharding::Row) => (chunk * self.cols, [rows, self.cols]),
            (Layout::Features, Sharding::Column) => (chunk * self.cols * cols, [self.cols, cols]),
        }
    }

    pub fn block<'a, R>(&self, chunk: usize, weight: &'a [R]) -> Mat<'a, R> {
        let (at, [rows, cols]) = self.block_at(chunk);
        Mat::new(&weight[at..], rows, cols, self.weight[1])
    }

    pub fn block_mut<'a, R>(&self, chunk: usize, weight: &'a mut [R]) -> MatMut<'a, R> {
        let (at, [rows, cols]) = self.block_at(chunk);
        MatMut::new(&mut weight[at..], rows, cols, self.weight[1])
    }
}
