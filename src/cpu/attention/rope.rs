//! Rotation of the pairs of columns of one head.
//!
//! A pair (a, b) with (c, s) = (cos φ, sin φ) of its token becomes (a·c − b·s, b·c + a·s); gradients turn
//! the other way.

use std::ops::Range;

use crate::cpu::real::Real;
use crate::cpu::simd::vectorised;
use crate::ops::Rope;

/// How the rows of q and k are turned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rotation<'a, R> {
    /// Which columns are pairs; not [`Rope::None`].
    pub rope: Rope,
    /// `[T, head_dim / 2, 2]`: cos and sin of each token and pair.
    pub table: &'a [R],
    /// Width of a head.
    pub head_dim: usize,
}

impl<R: Real> Rotation<'_, R> {
    /// Turns the dense rows `x[tokens, head_dim]`.
    pub fn forward(&self, x: &mut [R], tokens: &Range<usize>) {
        self.rows(x, tokens, R::ONE);
    }

    /// Turns the gradients of turned rows back into those of the rows before.
    pub fn backward(&self, dx: &mut [R], tokens: &Range<usize>) {
        self.rows(dx, tokens, -R::ONE);
    }

    fn rows(&self, x: &mut [R], tokens: &Range<usize>, sign: R) {
        let dim = self.head_dim;
        let table = &self.table[tokens.start * dim..tokens.end * dim];
        vectorised(
            #[inline(always)]
            || {
                for (x, table) in x.chunks_exact_mut(dim).zip(table.chunks_exact(dim)) {
                    self.row(x, table, sign);
                }
            },
        );
    }

    #[inline(always)]
    fn row(&self, x: &mut [R], table: &[R], sign: R) {
        let angles = table.as_chunks::<2>().0;
        if self.rope == Rope::Halves {
            let (a, b) = x.split_at_mut(self.head_dim / 2);
            for ((a, b), angle) in a.iter_mut().zip(b).zip(angles) {
                (*a, *b) = turned(*a, *b, angle, sign);
            }
        } else {
            for ([a, b], angle) in x.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                (*a, *b) = turned(*a, *b, angle, sign);
            }
        }
    }
}

#[inline(always)]
fn turned<R: Real>(a: R, b: R, &[cos, sin]: &[R; 2], sign: R) -> (R, R) {
    let sin = sign * sin;
    (a * cos - b * sin, b * cos + a * sin)
}
