//! Sharded linear layers on the CPU device, chunk by chunk while the next chunk is on its way.
//!
//! Weights are `[out, in]`, `y = x Wᵀ + b`. Rank i of k holds `out/k` rows ([`Sharding::Row`]) or `in/k` columns
//! ([`Sharding::Column`]) of W, and activations between layers lie in one of two layouts:
//!
//! | sharding, layout | x of rank i | y of rank i | bias of rank i |
//! |---|---|---|---|
//! | row, features | `[T, in/k]` | `[T, out/k]` | `[out/k]` |
//! | row, tokens | `[T/k, in]` | `[T, out/k]` | `[out/k]` |
//! | column, features | `[T, in/k]` | `[T, out/k]` | `[out/k]` |
//! | column, tokens | `[T, in/k]` | `[T/k, out]` | `[out]`, the same everywhere |
//!
//! Backward, with the chunk c of a ring on rank i, `W_c` the block of W that meets it (all that the rank holds,
//! where tokens are shared out) and `x_c`, `y_c` the rows that do:
//!
//! | | row | column |
//! |---|---|---|
//! | forward | gather x: `y_c += x_c W_cᵀ` | `y_c = Σ_i x_c W_cᵀ`, reduce y |
//! | dx | `dx_c = Σ_i dy_c W_c`, reduce dx | gather dy: `dx_c += dy_c W_c` |
//! | dW | gather x again, or keep it: `dW_c += dy_cᵀ x_c` | with the same dy: `dW_c += dy_cᵀ x_c` |
//!
//! The order of every sum follows from shapes and ranks alone, so results are the same in every run.

mod chunks;
mod lanes;

use bytemuck::Pod;

use super::group::Group;
use super::mesh::check_divides;
use super::ring::{self, Rings, Sharding};
use crate::cpu::gemm::{bias_grad, gemm};
use crate::cpu::real::Real;
use crate::cpu::simd::add_assign;
use crate::error::{Error, Result};
use chunks::{Chunks, Part, rows, rows_mut};
use lanes::{Gather, Reduce};

/// What the ranks share out of the activations on the side of a layer that communicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Columns: every rank has some features of all tokens (ViT-22B).
    Features,
    /// Rows: every rank has all features of some tokens, so that norms are local (sequence parallelism,
    /// Korthikanti et al. 2022).
    Tokens,
}

/// Operand of a forward pass as the backward pass finds it.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a, R> {
    /// This rank's part alone; a row-sharded layer gathers the others' again.
    Local(&'a [R]),
    /// All parts in the order of the ranks, as the forward pass of a row-sharded layer has left them.
    Gathered(&'a [R]),
}

/// Gradients that a backward pass makes.
#[derive(Debug)]
pub struct Grads<'a, R> {
    /// That of x, written.
    pub dx: &'a mut [R],
    /// That of this rank's part of the weight, added to.
    pub dw: &'a mut [R],
    /// That of this rank's bias, added to; the same on all ranks where the bias is.
    pub db: Option<&'a mut [R]>,
}

/// A linear layer shared out over a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardedLinear {
    sharding: Sharding,
    layout: Layout,
    rings: Rings,
    size: usize,
    inner: usize,
    outer: usize,
}

impl ShardedLinear {
    /// The layer of `inner` inputs and `outer` outputs on `size` ranks.
    ///
    /// # Errors
    /// Where the widths that are shared out do not divide by `size`, or something is 0.
    pub fn new(
        sharding: Sharding,
        layout: Layout,
        rings: Rings,
        [inner, outer]: [usize; 2],
        size: usize,
    ) -> Result<Self> {
        if size == 0 || inner == 0 || outer == 0 {
            return Err(Error::usage(format!(
                "a layer of {inner} inputs and {outer} outputs cannot be shared by {size} ranks"
            )));
        }
        let (inputs, outputs) = (("input width", inner), ("output width", outer));
        match (layout, sharding) {
            (Layout::Features, _) => check_divides(size, &[inputs, outputs])?,
            (Layout::Tokens, Sharding::Row) => check_divides(size, &[outputs])?,
            (Layout::Tokens, Sharding::Column) => check_divides(size, &[inputs])?,
        }
        Ok(Self { sharding, layout, rings, size, inner, outer })
    }

    /// Shape of a rank's part of the weight.
    pub fn weight_shape(&self) -> [usize; 2] {
        match self.sharding {
            Sharding::Row => [self.outer / self.size, self.inner],
            Sharding::Column => [self.outer, self.inner / self.size],
        }
    }

    /// Length of a rank's bias.
    pub fn bias_len(&self) -> usize {
        match (self.layout, self.sharding) {
            (Layout::Tokens, Sharding::Column) => self.outer,
            _ => self.outer / self.size,
        }
    }

    /// Shape of a rank's x for `tokens` tokens.
    pub fn input_shape(&self, tokens: usize) -> [usize; 2] {
        match (self.layout, self.sharding) {
            (Layout::Tokens, Sharding::Row) => [tokens / self.size, self.inner],
            _ => [tokens, self.inner / self.size],
        }
    }

    /// Shape of a rank's y for `tokens` tokens.
    pub fn output_shape(&self, tokens: usize) -> [usize; 2] {
        match (self.layout, self.sharding) {
            (Layout::Tokens, Sharding::Column) => [tokens / self.size, self.outer],
            _ => [tokens, self.outer / self.size],
        }
    }

    /// Shape of the chunks that go round: parts of x where rows are shared out, of y where columns are.
    pub fn chunk_shape(&self, tokens: usize) -> [usize; 2] {
        match self.sharding {
            Sharding::Row => self.input_shape(tokens),
            Sharding::Column => self.output_shape(tokens),
        }
    }

    /// Elements that rank `rank` sends to each rank in the forward pass of `tokens` tokens.
    pub fn forward_volume(&self, rank: usize, tokens: usize) -> Vec<u64> {
        let [rows, cols] = self.chunk_shape(tokens);
        ring::volume(self.rings, rank, self.size, rows, cols)
    }

    /// Elements that rank `rank` sends to each rank in the backward pass: once as many as forward, and twice
    /// where a row-sharded layer has not kept its gathered operand.
    pub fn backward_volume(&self, rank: usize, tokens: usize, kept: bool) -> Vec<u64> {
        let twice = self.sharding == Sharding::Row && !kept;
        let mut sent = self.forward_volume(rank, tokens);
        sent.iter_mut().for_each(|sent| *sent *= if twice { 2 } else { 1 });
        sent
    }

    /// Tokens of a batch, from the length of x.
    fn tokens(&self, x: usize) -> usize {
        match (self.layout, self.sharding) {
            (Layout::Tokens, Sharding::Row) => x / self.inner * self.size,
            _ => x / (self.inner / self.size),
        }
    }

    fn check(&self, group: &Group, parts: &[(&str, usize, usize)]) {
        assert_eq!(group.size(), self.size, "sharded linear: ranks of the group");
        for (what, len, expected) in parts {
            assert_eq!(len, expected, "sharded linear: length of {what}");
        }
    }

    /// `y = x Wᵀ + b`. A row-sharded layer writes all parts of x to `gathered` where it is given.
    ///
    /// # Errors
    /// Those of [`Group::receive`], and a number of tokens that the ranks cannot share.
    ///
    /// # Panics
    /// If a slice has not the length of its shape: a bug of the caller, not of a user.
    pub fn forward<R: Real + Pod>(
        &self,
        group: &Group,
        y: &mut [R],
        gathered: Option<&mut [R]>,
        x: &[R],
        weight: &[R],
        bias: Option<&[R]>,
    ) -> Result<()> {
        let tokens = self.tokens(x.len());
        self.check_tokens(tokens)?;
        let len = |[rows, cols]: [usize; 2]| rows * cols;
        self.check(
            group,
            &[
                ("x", x.len(), len(self.input_shape(tokens))),
                ("y", y.len(), len(self.output_shape(tokens))),
                ("the weight", weight.len(), len(self.weight_shape())),
                ("the bias", bias.map_or(self.bias_len(), <[R]>::len), self.bias_len()),
            ],
        );
        let chunks = Chunks::new(self, group, tokens);
        match self.sharding {
            Sharding::Row => self.forward_row(group, &chunks, y, gathered, x, weight)?,
            Sharding::Column => self.forward_column(group, &chunks, y, x, weight)?,
        }
        if let Some(bias) = bias {
            y.chunks_exact_mut(bias.len()).for_each(|y| add_assign(y, bias));
        }
        Ok(())
    }

    fn check_tokens(&self, tokens: usize) -> Result<()> {
        match self.layout {
            Layout::Tokens => check_divides(self.size, &[("tokens", tokens)]),
            Layout::Features => Ok(()),
        }
    }

    fn forward_row<R: Real + Pod>(
        &self,
        group: &Group,
        chunks: &Chunks,
        y: &mut [R],
        mut gathered: Option<&mut [R]>,
        x: &[R],
        weight: &[R],
    ) -> Result<()> {
        let width = self.outer / self.size;
        let mut ring = Gather::new(group, chunks, x);
        for step in 0..self.size {
            ring.post(step)?;
            group.product(step, chunks.flops(width), || {
                for (part, piece) in ring.pieces(step) {
                    let block = chunks.block(part.chunk, weight);
                    let rows = chunks.token_rows(&part);
                    let y = rows_mut(y, &rows, width);
                    gemm(y, chunks.accumulates(step), R::ONE, piece, block.t(), true);
                    if let Some(gathered) = &mut gathered {
                        let at = (part.chunk * chunks.rows + part.rows.start) * chunks.cols;
                        gathered[at..][..piece.data.len()].copy_from_slice(piece.data);
                    }
                }
            });
            ring.advance(step)?;
        }
        Ok(())
    }

    fn forward_column<R: Real + Pod>(
        &self,
        group: &Group,
        chunks: &Chunks,
        y: &mut [R],
        x: &[R],
        weight: &[R],
    ) -> Result<()> {
        let width = self.inner / self.size;
        let mut ring = Reduce::new(group, chunks, y);
        for step in 0..self.size {
            group.product(step, chunks.flops(width), || {
                for (part, piece) in ring.pieces(step) {
                    let block = chunks.block(part.chunk, weight);
                    gemm(piece, false, R::ONE, rows(x, &chunks.token_rows(&part), width), block.t(), true);
                }
            });
            ring.advance(step)?;
        }
        Ok(())
    }

    /// All gradients of the layer from `dy`.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    ///
    /// # Panics
    /// If a slice has not the length of its shape: a bug of the caller, not of a user.
    pub fn backward<R: Real + Pod>(
        &self,
        group: &Group,
        grads: Grads<'_, R>,
        dy: &[R],
        x: Operand<'_, R>,
        weight: &[R],
    ) -> Result<()> {
        let tokens = self.tokens(grads.dx.len());
        self.check_tokens(tokens)?;
        let len = |[rows, cols]: [usize; 2]| rows * cols;
        let operand = len(self.input_shape(tokens));
        let (x_len, x_expected) = match x {
            Operand::Local(x) => (x.len(), operand),
            Operand::Gathered(x) => (x.len(), operand * self.size),
        };
        self.check(
            group,
            &[
                ("dx", grads.dx.len(), operand),
                ("dy", dy.len(), len(self.output_shape(tokens))),
                ("x", x_len, x_expected),
                ("the weight", weight.len(), len(self.weight_shape())),
                ("dw", grads.dw.len(), weight.len()),
                ("db", grads.db.as_ref().map_or(self.bias_len(), |db| db.len()), self.bias_len()),
            ],
        );
        let chunks = Chunks::new(self, group, tokens);
        match (self.sharding, x) {
            (Sharding::Row, x) => self.backward_row(group, &chunks, grads, dy, x, weight),
            (Sharding::Column, Operand::Local(x)) => {
                self.backward_column(group, &chunks, grads, dy, x, weight)
            }
            (Sharding::Column, Operand::Gathered(_)) => panic!("a column-sharded layer gathers no operand"),
        }
    }

    /// Two rings at once: sums of dx go round, and x where it was not kept.
    fn backward_row<R: Real + Pod>(
        &self,
        group: &Group,
        chunks: &Chunks,
        grads: Grads<'_, R>,
        dy: &[R],
        x: Operand<'_, R>,
        weight: &[R],
    ) -> Result<()> {
        let width = self.outer / self.size;
        let mut sums = Reduce::new(group, chunks, grads.dx);
        let mut gather = match x {
            Operand::Local(x) => Some(Gather::new(group, chunks, x)),
            Operand::Gathered(_) => None,
        };
        for step in 0..self.size {
            if let Some(gather) = &mut gather {
                gather.post(step)?;
            }
            group.product(step, chunks.flops(width), || {
                for (part, piece) in sums.pieces(step) {
                    let block = chunks.block(part.chunk, weight);
                    gemm(piece, false, R::ONE, rows(dy, &chunks.token_rows(&part), width), block, true);
                }
            });
            sums.advance(step)?;
            group.product(step, chunks.flops(width), || {
                let mut add = |part: &Part, piece| {
                    let dy = rows(dy, &chunks.token_rows(part), width);
                    gemm(chunks.block_mut(part.chunk, grads.dw), true, R::ONE, dy.t(), piece, true);
                };
                match (&gather, x) {
                    (Some(gather), _) => gather.pieces(step).for_each(|(part, piece)| add(&part, piece)),
                    (None, Operand::Local(x) | Operand::Gathered(x)) => {
                        let part = Part { chunk: step, rows: 0..chunks.rows };
                        let first = step * chunks.rows;
                        add(&part, rows(x, &(first..first + chunks.rows), chunks.cols));
                    }
                }
            });
            if let Some(gather) = &mut gather {
                gather.advance(step)?;
            }
        }
        if let Some(db) = grads.db {
            bias_grad(db, dy);
        }
        Ok(())
    }

    /// One ring: dy goes round and meets both the weight and x.
    fn backward_column<R: Real + Pod>(
        &self,
        group: &Group,
        chunks: &Chunks,
        grads: Grads<'_, R>,
        dy: &[R],
        x: &[R],
        weight: &[R],
    ) -> Result<()> {
        let width = self.inner / self.size;
        let replicated = self.layout == Layout::Tokens;
        // Sums over the rows of each chunk's parts: added up in the order of the chunks, not of their arrival,
        // so that a bias that all ranks have stays the same on all.
        let mut column_sums: Vec<Vec<Vec<R>>> = vec![Vec::new(); self.size];
        let mut ring = Gather::new(group, chunks, dy);
        for step in 0..self.size {
            ring.post(step)?;
            group.product(step, 2.0 * chunks.flops(width), || {
                for (part, piece) in ring.pieces(step) {
                    let range = chunks.token_rows(&part);
                    let block = chunks.block(part.chunk, weight);
                    let dx = rows_mut(grads.dx, &range, width);
                    gemm(dx, chunks.accumulates(step), R::ONE, piece, block, true);
                    let dw = chunks.block_mut(part.chunk, grads.dw);
                    gemm(dw, true, R::ONE, piece.t(), rows(x, &range, width), true);
                    if replicated && grads.db.is_some() {
                        let mut sum = vec![R::ZERO; chunks.cols];
                        bias_grad(&mut sum, piece.data);
                        // Parts of a chunk that two rings bring come in the order of the rings or the other.
                        let at = if part.rows.start == 0 { 0 } else { column_sums[part.chunk].len() };
                        column_sums[part.chunk].insert(at, sum);
                    }
                }
            });
            ring.advance(step)?;
        }
        match grads.db {
            Some(db) if replicated => column_sums.iter().flatten().for_each(|sum| add_assign(db, sum)),
            Some(db) => bias_grad(db, dy),
            None => {}
        }
        Ok(())
    }
}
