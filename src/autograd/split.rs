//! What a rank of the tensor axis holds of a model: which part of each parameter, which rows of the tokens.

use std::ops::Range;

/// One of the equal parts into which the tensor axis shares out heads, hidden widths and token rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which part, from 0.
    pub rank: usize,
    /// Of how many.
    pub size: usize,
}

impl Shard {
    /// All there is.
    pub const WHOLE: Self = Self { rank: 0, size: 1 };

    /// Whether there are other parts.
    pub fn is_part(self) -> bool {
        self.size > 1
    }

    /// Of `live` rows of `rows` times [`size`](Self::size), those in this part, which has `rows`.
    pub fn live(self, live: usize, rows: usize) -> usize {
        live.saturating_sub(self.rank * rows).min(rows)
    }
}

impl Default for Shard {
    fn default() -> Self {
        Self::WHOLE
    }
}

/// How a parameter is shared out over the tensor axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Every rank has all of it and computes its whole gradient.
    Whole,
    /// Every rank has all of it and computes a summand of its gradient.
    Summed,
    /// Rows, or elements of a vector, of each of so many segments: queries, keys and values are shared out by
    /// heads each, not as one slab.
    Rows(usize),
    /// Columns.
    Columns,
}

impl Split {
    /// Whether every rank has all of the parameter.
    pub fn is_replicated(self) -> bool {
        matches!(self, Self::Whole | Self::Summed)
    }

    /// Rows and columns of a rank's part of a matrix; a vector is one row.
    ///
    /// # Panics
    /// If they do not divide: whoever shards a model checks that first.
    pub fn local(self, [rows, cols]: [usize; 2], size: usize) -> [usize; 2] {
        let part = |n: usize, segments: usize| {
            assert!(n.is_multiple_of(segments * size), "{n} cannot be shared out to {size} ranks");
            n / size
        };
        match self {
            Self::Whole | Self::Summed => [rows, cols],
            Self::Rows(segments) if rows == 1 => [1, part(cols, segments)],
            Self::Rows(segments) => [part(rows, segments), cols],
            Self::Columns => [rows, part(cols, 1)],
        }
    }

    /// Where what `shard` holds lies in the whole parameter of `shape`, in its order.
    fn runs(self, shape: &[usize], shard: Shard) -> Vec<Range<usize>> {
        let rows = shape.first().copied().unwrap_or(1);
        let cols: usize = shape.iter().skip(1).product();
        let Shard { rank, size } = shard;
        match self {
            Self::Whole | Self::Summed => std::iter::once(0..rows * cols).collect(),
            Self::Rows(segments) => {
                let part = rows / segments / size;
                let start = |i: usize| (i * (rows / segments) + rank * part) * cols;
                (0..segments).map(|i| start(i)..start(i) + part * cols).collect()
            }
            Self::Columns => {
                let part = cols / size;
                (0..rows).map(|row| row * cols + rank * part..row * cols + (rank + 1) * part).collect()
            }
        }
    }

    /// What `shard` holds of a parameter of `shape`.
    pub fn part<T: Copy>(self, data: &[T], shape: &[usize], shard: Shard) -> Vec<T> {
        self.runs(shape, shard).into_iter().flat_map(|run| data[run].iter().copied()).collect()
    }

    /// Writes what `shard` holds of a parameter of `shape` to its place in the whole.
    pub fn place<T: Copy>(self, whole: &mut [T], part: &[T], shape: &[usize], shard: Shard) {
        let mut rest = part;
        for run in self.runs(shape, shard) {
            let (head, tail) = rest.split_at(run.len());
            whole[run].copy_from_slice(head);
            rest = tail;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Shard = Shard { rank: 1, size: 2 };

    #[test]
    fn parts_are_by_segment_and_merge_again() {
        let rows: Vec<usize> = (0..12).collect();
        assert_eq!(Split::Rows(3).part(&rows, &[12], SECOND), [2, 3, 6, 7, 10, 11]);
        assert_eq!(Split::Rows(3).part(&rows, &[6, 2], Shard { rank: 0, size: 2 }), [0, 1, 4, 5, 8, 9]);
        assert_eq!(Split::Columns.part(&rows, &[3, 4], SECOND), [2, 3, 6, 7, 10, 11]);
        for (split, shape) in [
            (Split::Rows(3), &[6, 2][..]),
            (Split::Rows(1), &[12]),
            (Split::Columns, &[2, 6]),
            (Split::Whole, &[12]),
            (Split::Summed, &[3, 4]),
        ] {
            let mut whole = vec![0; 12];
            for rank in 0..2 {
                let shard = Shard { rank, size: 2 };
                split.place(&mut whole, &split.part(&rows, shape, shard), shape, shard);
            }
            assert_eq!(whole, rows, "{split:?}");
        }
    }

    #[test]
    fn local_shapes_have_the_length_of_parts() {
        for (split, shape) in [
            (Split::Rows(3), [6, 4]),
            (Split::Rows(2), [1, 8]),
            (Split::Columns, [3, 4]),
            (Split::Summed, [5, 7]),
        ] {
            let flat: &[usize] = if shape[0] == 1 { &shape[1..] } else { &shape };
            let data = vec![0; shape[0] * shape[1]];
            let [rows, cols] = split.local(shape, 2);
            assert_eq!(rows * cols, split.part(&data, flat, SECOND).len(), "{split:?}");
        }
    }

    #[test]
    fn live_rows_of_a_part() {
        let live = |rank, live| Shard { rank, size: 4 }.live(live, 10);
        assert_eq!([0, 1, 2, 3].map(|rank| live(rank, 25)), [10, 10, 5, 0]);
        assert_eq!(Shard::WHOLE.live(25, 40), 25);
    }
}
