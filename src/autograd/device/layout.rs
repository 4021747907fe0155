//! Where activations lie in the one arena: pure functions of the record and its liveness.

use std::ops::Range;

use super::super::graph::{Graph, Kind, Tensor};
use super::super::plan::Plan;

/// Alignment of a tensor in bytes.
pub const ALIGNMENT: usize = 256;
/// Elements to which rows of bf16 are padded: 16 bytes.
pub const ROW_UNIT: usize = 8;

/// Type of a tensor's elements on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Element {
    /// Activations and their gradients.
    #[default]
    Bf16,
    /// Statistics, losses, parameters and their gradients.
    F32,
}

/// Bytes that are held from one position of the order to another, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// How many.
    pub bytes: usize,
    /// First position.
    pub first: usize,
    /// Last position.
    pub last: usize,
}

/// The layout of a step's activations.
#[derive(Clone, Debug)]
pub struct ArenaPlan {
    /// Type of every tensor of the graph.
    pub elements: Vec<Element>,
    /// Bytes of the arena that hold each tensor; none where it lies elsewhere or is left out.
    pub slots: Vec<Option<Range<usize>>>,
    /// Bytes of the arena.
    pub bytes: usize,
    /// Most bytes that are in use at one time: no layout is smaller.
    pub peak: usize,
    /// When the memory of a tensor is held, and with it that of all that take its place one after another: for each of
    /// these the first.
    pub held: Vec<(Tensor, Interval)>,
}

impl ArenaPlan {
    /// Lays out the activations of `graph`. The result of an op that works in place shares the memory of its
    /// first operand where that has its last use there.
    pub fn new(graph: &Graph, plan: &Plan) -> Self {
        let mut elements = vec![Element::Bf16; graph.tensors.len()];
        for node in graph.nodes() {
            for (i, tensor) in node.outputs.iter().enumerate() {
                if let Some(tensor) = tensor {
                    elements[tensor.0] = node.op.element(i);
                }
            }
        }
        let bytes = |tensor: Tensor| {
            let info = graph.info(tensor);
            match elements[tensor.0] {
                Element::Bf16 => 2 * info.rows * info.cols.next_multiple_of(ROW_UNIT),
                Element::F32 => 4 * info.len(),
            }
        };

        let mut owner: Vec<Option<usize>> = vec![None; graph.tensors.len()];
        let (mut intervals, mut first): (Vec<Interval>, Vec<Tensor>) = (Vec::new(), Vec::new());
        for (at, &index) in plan.order.iter().enumerate() {
            let node = &graph.nodes[index];
            for (i, tensor) in node.outputs.iter().enumerate() {
                let Some(tensor) = tensor.filter(|_| plan.read[at][i]) else { continue };
                if graph.info(tensor).kind != Kind::Activation {
                    continue;
                }
                let moved = (i == 0 && node.op.in_place() && plan.last_use_of_first[at])
                    .then(|| owner[node.input(0).0])
                    .flatten()
                    .filter(|&first| intervals[first].bytes == bytes(tensor));
                owner[tensor.0] = Some(moved.unwrap_or_else(|| {
                    intervals.push(Interval { bytes: bytes(tensor), first: at, last: at });
                    first.push(tensor);
                    intervals.len() - 1
                }));
            }
            let used = node.inputs.iter().chain(&node.outputs).flatten();
            for interval in used.filter_map(|tensor| owner[tensor.0]) {
                intervals[interval].last = at;
            }
        }
        for interval in graph.kept.iter().filter_map(|tensor| owner[tensor.0]) {
            intervals[interval].last = plan.order.len();
        }

        let (offsets, total) = place(&intervals);
        let slot = |(tensor, owner): (usize, &Option<usize>)| {
            owner.map(|i| offsets[i]..offsets[i] + bytes(Tensor(tensor)))
        };
        let slots = owner.iter().enumerate().map(slot).collect();
        let peak = peak(&intervals);
        Self { slots, bytes: total, peak, held: first.into_iter().zip(intervals).collect(), elements }
    }
}

/// An offset for each interval, so that none overlaps another in time and place, and the bytes that hold them
/// all. The largest are placed first, each at the lowest offset where it fits.
pub fn place(intervals: &[Interval]) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..intervals.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(intervals[i].bytes), intervals[i].first, i));
    let mut offsets = vec![0; intervals.len()];
    // In order of their offsets.
    let mut placed: Vec<usize> = Vec::with_capacity(intervals.len());
    let mut total = 0;
    for i in order {
        let Interval { bytes, first, last } = intervals[i];
        let mut offset = 0;
        for &other in &placed {
            let (begin, there) = (offsets[other], intervals[other]);
            if there.last < first || last < there.first {
                continue;
            }
            if begin >= offset + bytes {
                break;
            }
            offset = offset.max((begin + there.bytes).next_multiple_of(ALIGNMENT));
        }
        offsets[i] = offset;
        total = total.max((offset + bytes).next_multiple_of(ALIGNMENT));
        let at = placed.partition_point(|&other| offsets[other] <= offset);
        placed.insert(at, i);
    }
    (offsets, total)
}

/// Most bytes of the intervals at one position.
pub fn peak(intervals: &[Interval]) -> usize {
    let end = intervals.iter().map(|interval| interval.last + 1).max().unwrap_or(0);
    let mut change = vec![0isize; end + 1];
    for interval in intervals {
        let bytes = interval.bytes.next_multiple_of(ALIGNMENT) as isize;
        change[interval.first] += bytes;
        change[interval.last + 1] -= bytes;
    }
    let held = change.iter().scan(0, |held, change| {
        *held += change;
        Some(*held)
    });
    held.max().unwrap_or(0) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    #[test]
    fn neighbours_in_time_share_memory() {
        let interval = |bytes, first, last| Interval { bytes, first, last };
        // The third may take the place of the first, which has ended.
        let (offsets, total) = place(&[interval(512, 0, 1), interval(256, 1, 2), interval(512, 2, 3)]);
        assert_eq!((offsets, total), (vec![0, 512, 0], 768));
        assert_eq!(place(&[]), (vec![], 0));
        assert_eq!(peak(&[interval(1, 0, 0), interval(300, 0, 4)]), 768);
    }

    #[test]
    fn nothing_that_lives_at_one_time_overlaps() {
        let mut stream = Stream::new(5, 0, 0, Purpose::Init);
        let mut below = |n: u32| (stream.bits() % n) as usize;
        for _ in 0..20 {
            let intervals: Vec<Interval> = (0..100)
                .map(|_| {
                    let first = below(60);
                    Interval { bytes: 1 + below(5000), first, last: first + below(12) }
                })
                .collect();
            let (offsets, total) = place(&intervals);
            for (i, a) in intervals.iter().enumerate() {
                assert!(offsets[i].is_multiple_of(ALIGNMENT) && offsets[i] + a.bytes <= total);
                for (j, b) in intervals.iter().enumerate().skip(i + 1) {
                    let together = a.first <= b.last && b.first <= a.last;
                    let apart = offsets[i] + a.bytes <= offsets[j] || offsets[j] + b.bytes <= offsets[i];
                    assert!(!together || apart, "{a:?} at {}, {b:?} at {}", offsets[i], offsets[j]);
                }
            }
            let least = peak(&intervals);
            assert!(total <= 2 * least, "{total} bytes for {least}");
        }
    }
}
