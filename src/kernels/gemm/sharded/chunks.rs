//! Chunks of rows, in the order in which a rank meets them.

use super::super::checked::refuse;
use super::super::tiles::MOST_CHUNKS;
use crate::Result;

/// A batch of rows in chunks of the same number of rows, and an order of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunks {
    rows: usize,
    order: Vec<usize>,
}

impl Chunks {
    /// Chunks of `rows` rows, met in `order`: every number below how many there are, once.
    ///
    /// # Errors
    /// No rows, no or more than [`MOST_CHUNKS`] chunks, an order with a chunk twice or one that is not there.
    pub fn new(rows: usize, order: Vec<usize>) -> Result<Self> {
        if rows == 0 || order.is_empty() || order.len() > MOST_CHUNKS {
            return refuse(format_args!(
                "there are {} chunks of {rows} rows; it must be 1 to {MOST_CHUNKS} of at least one row",
                order.len()
            ));
        }
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..order.len()) {
            return refuse(format_args!(
                "the order {order:?} has a chunk twice or one that is not there; it must have each once"
            ));
        }
        Ok(Self { rows, order })
    }

    /// What a rank of a ring meets, step by step. `rings` has the chunks that it multiplies in each direction that they
    /// take, in the order of its steps; of `rows` rows of a chunk each direction has as many. So with two directions,
    /// chunk 2 c is the upper half of the rows of rank c and 2 c + 1 the lower.
    ///
    /// # Errors
    /// As for [`new`](Self::new); rows that cannot be shared out so, directions with different numbers of steps.
    pub fn of_rings(rows: usize, rings: &[Vec<usize>]) -> Result<Self> {
        let directions = rings.len();
        let steps = rings.first().map_or(0, Vec::len);
        if rings.iter().any(|ring| ring.len() != steps) || directions == 0 || !rows.is_multiple_of(directions)
        {
            return refuse(format_args!(
                "chunks of {rows} rows cannot go in {directions} directions; rows must be a multiple of those, and each \
                 must have every chunk"
            ));
        }
        let step = |step: usize| (0..directions).map(move |way| directions * rings[way][step] + way);
        Self::new(rows / directions, (0..steps).flat_map(step).collect())
    }

    /// Rows of a chunk.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many there are.
    #[allow(clippy::len_without_is_empty)] // There is always one.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Rows of all.
    pub fn batch(&self) -> usize {
        self.rows.saturating_mul(self.len())
    }

    /// The chunks as they are met.
    pub fn order(&self) -> &[usize] {
        &self.order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_have_every_chunk_once() {
        assert_eq!(Chunks::new(8, vec![1, 0]).unwrap().batch(), 16);
        for order in [vec![], vec![0, 0], vec![0, 2], (0..65).collect()] {
            assert!(Chunks::new(8, order).is_err());
        }
        assert!(Chunks::new(0, vec![0]).is_err());
    }

    #[test]
    fn halves_go_both_ways() {
        // Rank 1 of 3: its own, then those of the ranks to its left and right.
        let chunks = Chunks::of_rings(6, &[vec![1, 0, 2], vec![1, 2, 0]]).unwrap();
        assert_eq!((chunks.rows(), chunks.order()), (3, &[2, 3, 0, 5, 4, 1][..]));
        assert_eq!(Chunks::of_rings(6, &[vec![1, 0]]).unwrap(), Chunks::new(6, vec![1, 0]).unwrap());
        assert!(Chunks::of_rings(7, &[vec![0, 1], vec![0, 1]]).is_err());
        assert!(Chunks::of_rings(6, &[vec![0, 1], vec![0]]).is_err());
        assert!(Chunks::of_rings(6, &[]).is_err());
    }
}
