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
    /// The same of three segments, the first being so many times as long as each of the others: queries whose heads
    /// share keys and values.
    Grouped(usize),
    /// Columns.
    Columns,
}

impl Split {
    /// Of queries, keys and values in a row, where `group` query heads share keys and values.
    pub fn queries_keys_values(group: usize) -> Self {
        if group == 1 { Self::Rows(3) } else { Self::Grouped(group) }
    }

    /// How many of the smallest segment all segments are.
    fn unit(self) -> Option<usize> {
        match self {
            Self::Whole | Self::Summed | Self::Columns => Some(1),
            Self::Rows(segments) => Some(segments),
            Self::Grouped(group) => group.checked_add(2),
        }
    }

    /// Whether `n` rows, or columns, can be shared out to `size` ranks.
    fn divides(self, n: usize, size: usize) -> bool {
        let parts = self.unit().and_then(|unit| unit.checked_mul(size));
        parts.is_some_and(|parts| parts > 0 && n.is_multiple_of(parts))
    }

    /// Whether every rank has all of the parameter.
    pub fn is_replicated(self) -> bool {
        matches!(self, Self::Whole | Self::Summed)
    }

    /// Rows and columns of a rank's part of a matrix; a vector is one row.
    ///
    /// # Panics
    /// If they do not divide: whoever shards a model checks that first.
    pub fn local(self, [rows, cols]: [usize; 2], size: usize) -> [usize; 2] {
        let part = |n: usize| {
            assert!(self.divides(n, size), "{n} cannot be shared out to {size} ranks");
            n / size
        };
        match self {
            Self::Whole | Self::Summed => [rows, cols],
            Self::Rows(_) | Self::Grouped(_) if rows == 1 => [1, part(cols)],
            Self::Rows(_) | Self::Grouped(_) => [part(rows), cols],
            Self::Columns => [rows, part(cols)],
        }
    }

    /// Elements of each rank's part of a parameter of `shape`; none where it cannot be shared out to `size` ranks, or no
    /// memory holds so many. Both may come from a file.
    pub fn part_len(self, shape: &[usize], size: usize) -> Option<usize> {
        let [rows, cols] = matrix(shape)?;
        let len = rows.checked_mul(cols)?;
        let divides = match self {
            Self::Whole | Self::Summed => return Some(len),
            Self::Grouped(0) => false,
            Self::Rows(_) | Self::Grouped(_) => self.divides(rows, size),
            Self::Columns => self.divides(cols, size),
        };
        divides.then(|| len / size)
    }

    /// Where elements `range` of what `shard` holds lie in the whole parameter of `shape`, in its order: as few runs as
    /// there can be, and none for a shape or a split that [`part_len`](Self::part_len) refuses. The work is that of the
    /// elements in the range, whatever the split says.
    pub fn runs_of(self, shape: &[usize], shard: Shard, range: Range<usize>) -> Vec<Range<usize>> {
        let Shard { rank, size } = shard;
        let (Some(len), Some([rows, cols])) = (self.part_len(shape, size), matrix(shape)) else {
            return Vec::new();
        };
        let range = range.start..range.end.min(len);
        let mut runs: Vec<Range<usize>> = Vec::new();
        // A run of the whole, and where it starts in the part.
        let mut add = |at: usize, run: Range<usize>| {
            let (first, last) = (range.start.max(at), range.end.min(at + run.len()));
            if first < last {
                let run = run.start + first - at..run.start + last - at;
                match runs.last_mut() {
                    Some(before) if before.end == run.start => before.end = run.end,
                    _ => runs.push(run),
                }
            }
        };
        // Segments of so many elements, of each of which every rank has the same number.
        let segment = match self {
            Self::Whole | Self::Summed => {
                add(0, 0..len);
                return runs;
            }
            Self::Grouped(group) => {
                let unit = rows / (group + 2);
                let (mut at, mut first) = (0, 0);
                for length in [group * unit, unit, unit] {
                    let part = length / size;
                    let start = (first + rank * part) * cols;
                    add(at, start..start + part * cols);
                    at += part * cols;
                    first += length;
                }
                return runs;
            }
            Self::Rows(segments) => rows / segments * cols,
            Self::Columns => cols,
        };
        let part = segment / size;
        let Some(first) = range.start.checked_div(part) else { return runs };
        for number in first..range.end.div_ceil(part) {
            let start = number * segment + rank * part;
            add(number * part, start..start + part);
        }
        runs
    }
}

/// Rows and columns of a shape; none where the columns cannot be counted.
fn matrix(shape: &[usize]) -> Option<[usize; 2]> {
    let rows = shape.first().copied().unwrap_or(1);
    let cols = shape.iter().skip(1).try_fold(1usize, |cols, n| cols.checked_mul(*n))?;
    Some([rows, cols])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Shard = Shard { rank: 1, size: 2 };

    /// What `shard` holds of the whole.
    fn part(split: Split, whole: &[usize], shape: &[usize], shard: Shard) -> Vec<usize> {
        let len = split.part_len(shape, shard.size).unwrap();
        split.runs_of(shape, shard, 0..len).into_iter().flat_map(|run| whole[run].to_vec()).collect()
    }

    #[test]
    fn parts_are_by_segment_and_hold_everything_once() {
        let rows: Vec<usize> = (0..12).collect();
        assert_eq!(part(Split::Rows(3), &rows, &[12], SECOND), [2, 3, 6, 7, 10, 11]);
        assert_eq!(part(Split::Rows(3), &rows, &[6, 2], Shard { rank: 0, size: 2 }), [0, 1, 4, 5, 8, 9]);
        // Four query heads and two for keys and values, of one row and one column each.
        let rows_of = |rank| part(Split::Grouped(2), &rows[..8], &[8], Shard { rank, size: 2 });
        assert_eq!([rows_of(0), rows_of(1)], [[0, 1, 4, 6], [2, 3, 5, 7]]);
        assert_eq!(part(Split::Columns, &rows, &[3, 4], SECOND), [2, 3, 6, 7, 10, 11]);
        for (split, shape) in [
            (Split::Rows(3), &[6, 2][..]),
            (Split::Grouped(4), &[12, 1]),
            (Split::Rows(1), &[12]),
            (Split::Columns, &[2, 6]),
            (Split::Whole, &[12]),
            (Split::Summed, &[3, 4]),
        ] {
            let shards = if split.is_replicated() { 1 } else { 2 };
            let parts = (0..shards).map(|rank| part(split, &rows, shape, Shard { rank, size: shards }));
            let mut all: Vec<usize> = parts.flatten().collect();
            all.sort_unstable();
            assert_eq!(all, rows, "{split:?}");
        }
    }

    #[test]
    fn a_range_of_a_part_is_that_range_of_its_runs() {
        let rows: Vec<usize> = (0..24).collect();
        for (split, shape) in [
            (Split::Rows(3), &[6, 4][..]),
            (Split::Grouped(4), &[12, 2]),
            (Split::Columns, &[3, 8]),
            (Split::Whole, &[24]),
        ] {
            let part = part(split, &rows, shape, SECOND);
            for range in [0..part.len(), 3..9, 5..6, 4..4, 0..1] {
                let runs = split.runs_of(shape, SECOND, range.clone());
                let got: Vec<usize> = runs.into_iter().flat_map(|run| rows[run].to_vec()).collect();
                assert_eq!(got, part[range.clone()], "{split:?} {range:?}");
            }
            assert_eq!(split.runs_of(shape, Shard::WHOLE, 2..20).len(), 1, "{split:?}");
        }
    }

    #[test]
    fn local_shapes_have_the_length_of_parts() {
        for (split, shape) in [
            (Split::Rows(3), [6, 4]),
            (Split::Grouped(3), [10, 2]),
            (Split::Rows(2), [1, 8]),
            (Split::Columns, [3, 4]),
            (Split::Summed, [5, 7]),
        ] {
            let flat: &[usize] = if shape[0] == 1 { &shape[1..] } else { &shape };
            let [rows, cols] = split.local(shape, 2);
            assert_eq!(split.part_len(flat, 2), Some(rows * cols), "{split:?}");
        }
        for (split, shape) in [
            (Split::Rows(2), [6, 4]),
            (Split::Rows(0), [6, 4]),
            (Split::Grouped(2), [6, 4]),
            (Split::Columns, [4, 5]),
        ] {
            assert_eq!(split.part_len(&shape, 2), None, "{split:?}");
        }
    }

    #[test]
    fn what_a_file_may_say_is_refused_or_cheap() {
        const MOST: usize = usize::MAX;
        for (split, shape, size) in [
            (Split::Rows(MOST), &[6, 4][..], 2),
            (Split::Rows(MOST / 2 + 1), &[6, 4], 2),
            (Split::Grouped(MOST), &[6, 4], 1),
            (Split::Grouped(MOST - 2), &[6, 4], 3),
            (Split::Rows(1), &[6, 4], 0),
            (Split::Rows(1), &[6, 4], MOST),
            (Split::Columns, &[MOST, 2], 1),
            (Split::Whole, &[MOST, 2], 1),
            (Split::Whole, &[0, MOST, 2], 1),
        ] {
            assert_eq!(split.part_len(shape, size), None, "{split:?} {shape:?}");
            assert!(split.runs_of(shape, Shard { rank: 0, size }, 0..4).is_empty(), "{split:?} {shape:?}");
        }
        // As many segments as there are rows, of which few are asked for; and of no elements at all.
        let half = MOST / 2 + 1;
        assert_eq!(Split::Rows(half).runs_of(&[half], Shard::WHOLE, 5..9).first(), Some(&(5..9)));
        assert_eq!(Split::Columns.runs_of(&[half / 2, 2], SECOND, 1..3), [3..4, 5..6]);
        for (split, shape) in
            [(Split::Rows(MOST), [0, 4]), (Split::Columns, [MOST, 0]), (Split::Grouped(MOST - 2), [0, 4])]
        {
            assert!(split.runs_of(&shape, Shard::WHOLE, 0..MOST).is_empty(), "{split:?}");
        }
    }

    #[test]
    fn live_rows_of_a_part() {
        let live = |rank, live| Shard { rank, size: 4 }.live(live, 10);
        assert_eq!([0, 1, 2, 3].map(|rank| live(rank, 25)), [10, 10, 5, 0]);
        assert_eq!(Shard::WHOLE.live(25, 40), 25);
    }
}
