//! Schedules of the asynchronous parallel linear layers, and the bytes that they move.
//!
//! k ranks stand in a ring. A layer `y = x Wᵀ` of n inputs and m outputs is sharded in one of two ways
//! (Dehghani et al. 2023, section on asynchronous parallel linear operations; Wang et al. 2023, "Overlap
//! communication with dependent computation via decomposition"):
//!
//! | sharding | rank i holds | forward | bytes a rank sends for each token |
//! |---|---|---|---|
//! | row | m/k rows of W | chunks of x go round, each is multiplied where it arrives | (k − 1)·n/k elements |
//! | column | n/k columns of W | sums of chunks of y go round, each rank adds its product | (k − 1)·m/k elements |
//!
//! In step s of an all-gather the chunk that has just come is sent on *before* it is multiplied, and the next
//! is awaited *after*: it travels while the product runs. In step s of a reduce-scatter a product is made while
//! the sum that it is added to is on its way. So k steps take about k·max(product, message), where one after the
//! other takes k products and k − 1 messages.
//!
//! Two-directional rings halve every chunk's rows: the upper half goes right, the lower left, so that each link
//! carries half as much in the same steps.

use std::ops::Range;

/// Where a chunk goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From rank i to rank i + 1.
    Right,
    /// From rank i to rank i − 1.
    Left,
}

impl Direction {
    /// The rank `distance` ranks ahead of `rank` in this direction.
    pub fn ahead(self, rank: usize, distance: usize, size: usize) -> usize {
        let distance = distance % size;
        match self {
            Self::Right => (rank + distance) % size,
            Self::Left => (rank + size - distance) % size,
        }
    }

    /// The rank `distance` ranks behind.
    pub fn behind(self, rank: usize, distance: usize, size: usize) -> usize {
        self.opposite().ahead(rank, distance, size)
    }

    fn opposite(self) -> Self {
        match self {
            Self::Right => Self::Left,
            Self::Left => Self::Right,
        }
    }
}

/// How many directions chunks take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rings {
    /// Whole chunks, to the right.
    #[default]
    One,
    /// Halves, in both directions.
    Two,
}

impl Rings {
    /// The directions, each with the rows of a chunk of `rows` that take it.
    pub fn parts(self, rows: usize) -> Vec<(Direction, Range<usize>)> {
        match self {
            Self::One => vec![(Direction::Right, 0..rows)],
            Self::Two => vec![(Direction::Right, 0..rows / 2), (Direction::Left, rows / 2..rows)],
        }
    }
}

/// One step of a ring on one rank. In an all-gather what is sent goes before the product and what is received
/// comes after it; in a reduce-scatter the received sum is added to the product, and the result is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Chunk of the operand or of the result that is multiplied.
    pub multiply: usize,
    /// Chunk that is sent ahead.
    pub send: Option<usize>,
    /// Chunk that is received from behind.
    pub receive: Option<usize>,
}

/// Steps of rank `rank` of `size` in a ring all-gather into a product. Rank i has chunk i and multiplies all.
pub fn all_gather(rank: usize, size: usize, direction: Direction) -> Vec<Step> {
    let chunk = |step| direction.behind(rank, step, size);
    (0..size)
        .map(|step| {
            let last = step + 1 == size;
            Step {
                multiply: chunk(step),
                send: (!last).then(|| chunk(step)),
                receive: (!last).then(|| chunk(step + 1)),
            }
        })
        .collect()
}

/// Steps of rank `rank` of `size` in a product into a ring reduce-scatter. Every rank has a summand of every
/// chunk, and rank i ends with the sum of chunk i.
pub fn reduce_scatter(rank: usize, size: usize, direction: Direction) -> Vec<Step> {
    let chunk = |step| direction.behind(rank, step + 1, size);
    (0..size)
        .map(|step| Step {
            multiply: chunk(step),
            send: (step + 1 < size).then(|| chunk(step)),
            receive: (step > 0).then(|| chunk(step)),
        })
        .collect()
}

/// Elements that rank `rank` of `size` sends to each rank in one all-gather or reduce-scatter of chunks of
/// `rows` rows of `cols`: all `size − 1` chunks to its neighbour, or their halves to both.
pub fn volume(rings: Rings, rank: usize, size: usize, rows: usize, cols: usize) -> Vec<u64> {
    let mut sent = vec![0; size];
    for (direction, rows) in rings.parts(rows) {
        sent[direction.ahead(rank, 1, size)] += ((size - 1) * rows.len() * cols) as u64;
    }
    sent
}

/// Which dimension of a weight `[out, in]` is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharding {
    /// Outputs: an all-gather into the product, and back a product into a reduce-scatter.
    Row,
    /// Inputs: a product into a reduce-scatter, and back an all-gather into the product.
    Column,
}

impl Sharding {
    /// The sharding that sends less for a layer whose operand and result are both shared out by features:
    /// columns where there are fewer outputs than inputs (the second layer of an MLP), rows elsewhere.
    pub fn of_least_volume(inner: usize, outer: usize) -> Self {
        if outer < inner { Self::Column } else { Self::Row }
    }

    /// Elements that a rank sends for each token in the forward pass of such a layer.
    pub fn volume_per_token(self, inner: usize, outer: usize, size: usize) -> usize {
        let width = match self {
            Self::Row => inner,
            Self::Column => outer,
        };
        (size - 1) * (width / size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIRECTIONS: [Direction; 2] = [Direction::Right, Direction::Left];

    /// Figure of four ranks, written out.
    #[test]
    fn steps_of_one_rank_of_four() {
        let step = |multiply, send, receive| Step { multiply, send, receive };
        assert_eq!(
            all_gather(1, 4, Direction::Right),
            [
                step(1, Some(1), Some(0)),
                step(0, Some(0), Some(3)),
                step(3, Some(3), Some(2)),
                step(2, None, None)
            ]
        );
        assert_eq!(
            reduce_scatter(1, 4, Direction::Right),
            [
                step(0, Some(0), None),
                step(3, Some(3), Some(3)),
                step(2, Some(2), Some(2)),
                step(1, None, Some(1))
            ]
        );
        assert_eq!(
            all_gather(1, 4, Direction::Left)[..2],
            [step(1, Some(1), Some(2)), step(2, Some(2), Some(3))]
        );
        assert_eq!(all_gather(0, 1, Direction::Right), [step(0, None, None)]);
        assert_eq!(reduce_scatter(0, 1, Direction::Left), [step(0, None, None)]);
    }

    /// What a rank awaits in an all-gather is what the one behind it has sent in the same step; in a
    /// reduce-scatter, in the step before.
    #[test]
    fn what_is_received_was_sent() {
        for size in 1..=8 {
            for direction in DIRECTIONS {
                for rank in 0..size {
                    let behind = direction.behind(rank, 1, size);
                    let (mine, theirs) =
                        (all_gather(rank, size, direction), all_gather(behind, size, direction));
                    for (mine, theirs) in mine.iter().zip(&theirs) {
                        assert_eq!(mine.receive, theirs.send);
                    }
                    let (mine, theirs) =
                        (reduce_scatter(rank, size, direction), reduce_scatter(behind, size, direction));
                    assert_eq!(mine[0].receive, None);
                    for (mine, theirs) in mine[1..].iter().zip(&theirs) {
                        assert_eq!(mine.receive, theirs.send);
                        assert_eq!(mine.receive, Some(mine.multiply));
                    }
                    assert_eq!(mine[size - 1].multiply, rank);
                }
            }
        }
    }

    #[test]
    fn every_chunk_is_multiplied_once() {
        for size in 1..=8 {
            for (rank, direction) in (0..size).flat_map(|rank| DIRECTIONS.map(|d| (rank, d))) {
                for steps in [all_gather(rank, size, direction), reduce_scatter(rank, size, direction)] {
                    let mut chunks: Vec<usize> = steps.iter().map(|step| step.multiply).collect();
                    chunks.sort_unstable();
                    assert_eq!(chunks, (0..size).collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn halves_are_whole_and_links_carry_half() {
        for rows in [0, 1, 6, 7] {
            let parts = Rings::Two.parts(rows);
            assert_eq!((parts[0].1.start, parts[0].1.end, parts[1].1.end), (0, parts[1].1.start, rows));
        }
        assert_eq!(volume(Rings::One, 1, 4, 7, 10), [0, 0, 210, 0]);
        assert_eq!(volume(Rings::Two, 1, 4, 7, 10), [120, 0, 90, 0]);
        assert_eq!(volume(Rings::Two, 0, 2, 7, 10), [0, 70]);
        assert_eq!(volume(Rings::Two, 0, 1, 7, 10), [0]);
    }

    /// Of ViT-22B: columns for the second layer of the MLP, rows elsewhere.
    #[test]
    fn the_sharding_that_sends_less() {
        assert_eq!(Sharding::of_least_volume(24576, 6144), Sharding::Column);
        assert_eq!(Sharding::of_least_volume(6144, 24576), Sharding::Row);
        assert_eq!(Sharding::of_least_volume(6144, 6144), Sharding::Row);
        assert_eq!(Sharding::Row.volume_per_token(6144, 24576, 4), 3 * 1536);
        assert_eq!(Sharding::Column.volume_per_token(24576, 6144, 4), 3 * 1536);
    }
}
