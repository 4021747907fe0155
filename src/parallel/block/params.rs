//! Which part of each of a block's parameters a rank holds.

use std::collections::BTreeMap;

use super::super::collectives::part_of;

/// Parameters of a block, or their gradients, by their names in a checkpoint without `blocks.N.`.
pub type Tensors<R> = BTreeMap<String, Vec<R>>;

/// How a parameter is shared out over the tensor axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Every rank has all of it. Its gradient is summed over the ranks, but for the biases of the layers that
    /// end in a reduce-scatter, which every rank computes whole.
    Whole,
    /// Rows, or elements of a vector, of each of so many segments: queries, keys and values are shared out by
    /// heads each, not as one slab.
    Rows(usize),
    /// Columns.
    Columns,
}

impl Split {
    /// Of the parameter `name`; `per_head` where every head has gains of its own in QK-norm.
    pub fn of(name: &str, per_head: bool) -> Self {
        match name {
            "attn.qkv.weight" | "attn.qkv.bias" => Self::Rows(3),
            "mlp.fc1.weight" | "mlp.fc1.bias" => Self::Rows(1),
            "attn.proj.weight" | "mlp.fc2.weight" => Self::Columns,
            _ if per_head && (name.starts_with("attn.q_norm.") || name.starts_with("attn.k_norm.")) => {
                Self::Rows(1)
            }
            _ => Self::Whole,
        }
    }

    /// Offsets in the whole parameter of what rank `rank` of `size` holds, in its order.
    fn places(self, shape: &[usize], size: usize, rank: usize) -> Vec<usize> {
        let rows = shape.first().copied().unwrap_or(1);
        let cols: usize = shape.iter().skip(1).product();
        match self {
            Self::Whole => (0..rows * cols).collect(),
            Self::Rows(segments) => {
                let segment = rows / segments;
                let part = part_of(segment, size, rank);
                (0..segments)
                    .flat_map(|i| (i * segment + part.start) * cols..(i * segment + part.end) * cols)
                    .collect()
            }
            Self::Columns => {
                let part = part_of(cols, size, rank);
                (0..rows).flat_map(|row| row * cols + part.start..row * cols + part.end).collect()
            }
        }
    }

    /// What rank `rank` of `size` holds of a parameter of `shape`.
    pub fn part<T: Copy>(self, data: &[T], shape: &[usize], size: usize, rank: usize) -> Vec<T> {
        self.places(shape, size, rank).into_iter().map(|at| data[at]).collect()
    }

    /// The whole parameter from the parts of all ranks.
    pub fn merge<T: Copy + Default>(self, parts: &[Vec<T>], shape: &[usize]) -> Vec<T> {
        let mut whole = vec![T::default(); shape.iter().product()];
        for (rank, part) in parts.iter().enumerate() {
            for (at, &value) in self.places(shape, parts.len(), rank).into_iter().zip(part) {
                whole[at] = value;
            }
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_by_segment_and_merge_again() {
        let rows: Vec<usize> = (0..12).collect();
        assert_eq!(Split::Rows(3).part(&rows, &[12], 2, 1), [2, 3, 6, 7, 10, 11]);
        assert_eq!(Split::Rows(3).part(&rows, &[6, 2], 2, 0), [0, 1, 4, 5, 8, 9]);
        assert_eq!(Split::Columns.part(&rows, &[3, 4], 2, 1), [2, 3, 6, 7, 10, 11]);
        for (split, shape) in [
            (Split::Rows(3), &[6, 2][..]),
            (Split::Rows(1), &[12]),
            (Split::Columns, &[2, 6]),
            (Split::Whole, &[12]),
        ] {
            let parts = [0, 1].map(|rank| split.part(&rows, shape, 2, rank));
            assert_eq!(split.merge(&parts, shape), rows, "{split:?}");
        }
    }

    #[test]
    fn gains_are_shared_out_where_heads_have_their_own() {
        assert_eq!(Split::of("attn.q_norm.gain", true), Split::Rows(1));
        assert_eq!(Split::of("attn.q_norm.gain", false), Split::Whole);
        assert_eq!(Split::of("attn.proj.bias", false), Split::Whole);
    }
}
