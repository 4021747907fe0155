//! What a rank of the data axis keeps of the parameters on a device: a piece of every segment.
//!
//! A segment holds those parameters of a unit (`crate::parallel::zero`) that kernels read as one type: matrices in
//! bf16, vectors in f32; and whose gradients are to be treated alike on a tensor axis. They lie one after another, padded as [`ParamLayout`] pads them, and are cut into equal
//! pieces. A rank's pieces of all segments are the arena of its optimiser: masters, moments, gradients, average.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::super::graph::{Graph, ParamSpec};
use super::super::split::{Shard, Split};
use super::layout::Element;
use super::params::ParamLayout;
use crate::device::{Buffer, Device, Stream};
use crate::error::Result;
use crate::kernels::optim::{self, ALIGNMENT, Arena, SliceSpec, TensorSpec};
use crate::parallel::zero::{Slice, Units};

/// Parameters of a unit that are gathered in one operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// The unit.
    pub unit: usize,
    /// Type that kernels read.
    pub element: Element,
    /// Whether each rank of the tensor axis has a summand of its gradients.
    pub summed: bool,
    /// Elements of all ranks' pieces.
    pub len: usize,
    /// This rank's piece, in the arena of the pieces.
    pub piece: Range<usize>,
    /// Parameters, and where they lie in the segment.
    members: Vec<(usize, Range<usize>)>,
}

impl Segment {
    /// Whether there are no elements: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Members that lie in the piece of `rank`: the parameter, which of its padded elements, and where in the piece.
    fn members_of(&self, rank: usize) -> impl Iterator<Item = (usize, Range<usize>, usize)> {
        let (from, to) = (rank * self.piece.len(), (rank + 1) * self.piece.len());
        self.members.iter().filter_map(move |(p, range)| {
            let (first, last) = (range.start.max(from), range.end.min(to));
            (first < last).then(|| (*p, first - range.start..last - range.start, first - from))
        })
    }
}

/// How parameters are cut into pieces, and what this rank keeps.
#[derive(Clone, Debug)]
pub struct PieceLayout {
    params: ParamLayout,
    segments: Vec<Segment>,
    /// Segment and elements of each parameter.
    places: Vec<(usize, Range<usize>)>,
    arena: Arena,
    /// The parameter of each tensor of the arena, and which of its padded elements; none of what lies between them.
    slices: Vec<Option<(usize, Range<usize>)>>,
    /// Elements that the tensor axis shares out; those behind them are on all of its ranks.
    split: usize,
    rank: Shard,
}

impl PieceLayout {
    /// The pieces of `graph`'s parameters, which kernels read as `elements`; `decay` is the weight decay of each.
    ///
    /// # Errors
    /// No parameters, or more than the kernels count.
    pub fn new(
        graph: &Graph,
        units: &Units,
        elements: &[Element],
        decay: &dyn Fn(&ParamSpec) -> f64,
    ) -> Result<Self> {
        let params = ParamLayout::new(graph, decay)?;
        let rank = units.rank();
        let mut segments: Vec<Segment> = Vec::new();
        let mut places = vec![(0, 0..0); elements.len()];
        let (mut end, mut split) = (0, 0);
        // Parameters that are on all ranks of the tensor axis come last.
        let kind = |p: usize| match graph.split(p) {
            Split::Rows(_) | Split::Grouped(_) | Split::Columns => 0,
            Split::Summed => 1,
            Split::Whole => 2,
        };
        for of_kind in 0..3 {
            for (u, unit) in units.units().iter().enumerate() {
                for element in [Element::Bf16, Element::F32] {
                    let mut members = Vec::new();
                    let mut len = 0usize;
                    for p in unit.params.clone() {
                        if elements[p] != element || kind(p) != of_kind {
                            continue;
                        }
                        let [rows, cols] = params.shape(p);
                        members.push((p, len..len + rows * cols));
                        places[p] = (segments.len(), len..len + rows * cols);
                        len = (len + rows * cols).next_multiple_of(ALIGNMENT);
                    }
                    if members.is_empty() {
                        continue;
                    }
                    let len = len.next_multiple_of(ALIGNMENT * rank.size);
                    let piece = end..end + len / rank.size;
                    end = piece.end;
                    let summed = of_kind == 1;
                    segments.push(Segment { unit: u, element, summed, len, piece, members });
                }
            }
            if of_kind == 0 {
                split = end;
            }
        }
        let (mut slices, mut of_params) = (Vec::new(), Vec::new());
        for segment in &segments {
            let mut at = 0;
            for (p, range, start) in segment.members_of(rank.rank) {
                fill(&mut slices, at, start);
                of_params.resize(slices.len(), None);
                of_params.push(Some((p, range.clone())));
                let weight_decay = decay(&graph.params()[p]);
                let spec = TensorSpec { len: range.len(), weight_decay, adapts: weight_decay != 0.0 };
                slices.push(SliceSpec { spec, whole: Some(p) });
                at = (start + range.len()).next_multiple_of(ALIGNMENT);
            }
            fill(&mut slices, at, segment.piece.len());
            of_params.resize(slices.len(), None);
        }
        let arena = Arena::of_slices(&slices, places.len())?;
        debug_assert_eq!(arena.len(), end);
        Ok(Self { params, segments, places, arena, slices: of_params, split, rank })
    }

    /// The segments in the order of their pieces.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The arena of this rank's pieces.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// The parameter of each tensor of the arena, and which of its padded elements that is; none of what lies between.
    pub fn slices(&self) -> &[Option<(usize, Range<usize>)>] {
        &self.slices
    }

    /// Shapes of the parameters on the device.
    pub fn params(&self) -> &ParamLayout {
        &self.params
    }

    /// Segment of parameter `p`, and its elements there.
    pub fn place(&self, p: usize) -> (usize, Range<usize>) {
        self.places[p].clone()
    }

    /// This rank of the data axis.
    pub fn rank(&self) -> Shard {
        self.rank
    }

    /// How many elements of the arena, from the first, this rank counts in norms over all ranks: what several ranks
    /// of the tensor axis have is counted by the `first` of them.
    pub fn counted(&self, first: bool) -> usize {
        if first { self.arena.len() } else { self.split }
    }

    /// What rank `rank` of the data axis keeps of a segment, as dense elements of its part of each parameter.
    pub fn slices_of(&self, segment: usize, rank: usize) -> Vec<Slice> {
        let members = self.segments[segment].members_of(rank);
        members.map(|(param, range, _)| Slice { param, range: self.dense(param, range) }).collect()
    }

    /// This rank's piece of a segment from its dense slices.
    pub fn pack(&self, segment: usize, slices: &[Vec<f32>]) -> Vec<f32> {
        let segment = &self.segments[segment];
        let mut piece = vec![0.0; segment.piece.len()];
        for ((p, range, at), values) in segment.members_of(self.rank.rank).zip(slices) {
            let (to, first) = (&mut piece[at..][..range.len()], self.dense(p, range.clone()).start);
            self.runs(p, range, |padded, dense| {
                to[padded].copy_from_slice(&values[dense.start - first..dense.end - first]);
            });
        }
        piece
    }

    /// The inverse.
    pub fn unpack(&self, segment: usize, piece: &[f32]) -> Vec<Vec<f32>> {
        let members = self.segments[segment].members_of(self.rank.rank);
        let unpack = |(p, range, at): (usize, Range<usize>, usize)| {
            let (from, mut values) = (&piece[at..][..range.len()], Vec::new());
            self.runs(p, range, |padded, _| values.extend_from_slice(&from[padded]));
            values
        };
        members.map(unpack).collect()
    }

    /// Dense elements among padded ones of parameter `p`: one range, as what is left out lies at the ends of rows.
    fn dense(&self, p: usize, padded: Range<usize>) -> Range<usize> {
        let ([rows, cols], stride) = (self.params.dense(p), self.params.shape(p)[1].max(1));
        let dense = |at: usize| (at / stride * cols + (at % stride).min(cols)).min(rows * cols);
        dense(padded.start)..dense(padded.end)
    }

    /// Calls `copy` for every run of a row of parameter `p` that lies in `range` of its padded elements: where it is
    /// in the range, and where in the dense parameter.
    fn runs(&self, p: usize, range: Range<usize>, mut copy: impl FnMut(Range<usize>, Range<usize>)) {
        let ([rows, cols], stride) = (self.params.dense(p), self.params.shape(p)[1]);
        let first_row = range.start / stride.max(1);
        for row in first_row..rows {
            let (start, end) = ((row * stride).max(range.start), (row * stride + cols).min(range.end));
            if row * stride >= range.end {
                return;
            }
            if start < end {
                let dense = row * cols + start - row * stride;
                copy(start - range.start..end - range.start, dense..dense + end - start);
            }
        }
    }
}

/// What lies between tensors belongs to nobody and stays 0.
fn fill(slices: &mut Vec<SliceSpec>, from: usize, to: usize) {
    if from < to {
        let spec = TensorSpec { len: to - from, weight_decay: 0.0, adapts: false };
        slices.push(SliceSpec { spec, whole: None });
    }
}

/// A rank's pieces in device memory.
pub struct PieceParams {
    layout: Arc<PieceLayout>,
    master: Buffer<f32>,
    weights: Buffer<bf16>,
}

impl PieceParams {
    /// Zeros.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(device: &Device, layout: Arc<PieceLayout>) -> Result<Self> {
        let len = layout.arena().len();
        Ok(Self { master: device.zeros(len)?, weights: device.zeros(len)?, layout })
    }

    /// How they lie.
    pub fn layout(&self) -> &Arc<PieceLayout> {
        &self.layout
    }

    /// In f32.
    pub fn master(&self) -> &Buffer<f32> {
        &self.master
    }

    /// In bf16: whoever changes [`master`](Self::master) keeps it up to date by [`round`](Self::round).
    pub fn weights(&self) -> &Buffer<bf16> {
        &self.weights
    }

    /// Bytes of both.
    pub fn bytes(&self) -> usize {
        self.master.len() * size_of::<f32>() + self.weights.len() * size_of::<bf16>()
    }

    /// Queues the copy in bf16, rounded to nearest.
    ///
    /// # Errors
    /// A failed device.
    pub fn round(&self, stream: &Stream) -> Result<()> {
        optim::cast(stream, &self.weights, &self.master, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gemm;
    use crate::autograd::graph::{Extent, Init};

    /// Two blocks of a padded weight and a bias, and a head.
    fn graph() -> Graph {
        let mut graph = Graph::new();
        let mut x = graph.activation(4, 12, Extent::Fixed);
        for (name, shape) in [("blocks.0", [20, 12]), ("blocks.1", [12, 20]), ("head", [10, 12])] {
            let mut param = |part: &str, shape: &[usize]| {
                let (name, shape) = (format!("{name}.{part}"), shape.to_vec());
                graph.param(ParamSpec { name, shape, init: Init::Constant(0.0), decay: true, head: false })
            };
            let (weight, bias) = (param("w", &shape), param("b", &shape[..1]));
            x = gemm::linear(&mut graph, x, weight, Some(bias));
        }
        graph
    }

    #[test]
    fn pieces_hold_everything_once() {
        let graph = graph();
        let values: Vec<Vec<f32>> = graph
            .params()
            .iter()
            .enumerate()
            .map(|(p, param)| (0..param.len()).map(|i| (1000 * p + i + 1) as f32).collect())
            .collect();
        let elements = [Element::Bf16, Element::F32].repeat(3);
        for size in 1..=5 {
            let layout = |rank| {
                let units = Units::new(&graph, Shard { rank, size });
                PieceLayout::new(&graph, &units, &elements, &|param| param.len() as f64).unwrap()
            };
            let mut merged: Vec<Vec<f32>> = values.iter().map(|values| vec![0.0; values.len()]).collect();
            let mut arenas = Vec::new();
            for rank in 0..size {
                let layout = layout(rank);
                let mut arena = vec![0.0; layout.arena().len()];
                for (i, segment) in layout.segments().iter().enumerate() {
                    let slices = layout.slices_of(i, rank);
                    let own: Vec<_> =
                        slices.iter().map(|s| values[s.param][s.range.clone()].to_vec()).collect();
                    let piece = layout.pack(i, &own);
                    assert_eq!(layout.unpack(i, &piece), own, "{size} ranks");
                    arena[segment.piece.clone()].copy_from_slice(&piece);
                    for (slice, own) in slices.into_iter().zip(own) {
                        merged[slice.param][slice.range].copy_from_slice(&own);
                    }
                }
                arenas.push(arena);
            }
            assert_eq!(merged, values, "{size} ranks");
            let held: f32 = arenas.iter().flatten().sum();
            assert_eq!(held, values.iter().flatten().sum::<f32>(), "{size} ranks");
            for (rank, arena) in arenas.iter().enumerate() {
                let layout = layout(rank);
                assert_eq!(layout.segments().len(), 6);
                // The table of the optimiser knows whose elements these are.
                for (range, tensor) in layout.arena().ranges().iter().zip(layout.arena().tensors()) {
                    let decay = |x: f32| graph.params()[(x as usize - 1) / 1000].len() as f64;
                    let live = arena[range.clone()].iter().filter(|x| **x != 0.0);
                    assert!(live.clone().all(|x| decay(*x) == tensor.weight_decay));
                    let whole = |x: f32| (x as i32 - 1) / 1000;
                    assert!(live.copied().all(|x| whole(x) == tensor.whole));
                }
            }
        }
    }
}
