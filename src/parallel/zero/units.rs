//! Which elements of a model's parameters a rank of the data axis keeps.

use std::ops::Range;

use crate::autograd::{Graph, Shard};

/// Parameters that are gathered together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Their places in [`Graph::params`].
    pub params: Range<usize>,
    /// Elements of this rank's parts of them.
    pub len: usize,
}

/// Elements of a parameter that a rank keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Place of the parameter in [`Graph::params`].
    pub param: usize,
    /// Elements of the tensor rank's part of it.
    pub range: Range<usize>,
}

/// A model's parameters in units, and this rank's pieces of them: of the concatenated parameters of a unit of n
/// elements, rank r of k keeps elements `r·⌈n/k⌉` to `(r + 1)·⌈n/k⌉`.
#[derive(Clone, Debug)]
pub struct Units {
    units: Vec<Unit>,
    /// Number of elements of each parameter.
    lens: Vec<usize>,
    rank: Shard,
    slices: Vec<Slice>,
    /// Those of each unit among them.
    of_unit: Vec<Range<usize>>,
}

impl Units {
    /// The units of `graph` on rank `rank` of the data axis.
    pub fn new(graph: &Graph, rank: Shard) -> Self {
        let lens: Vec<usize> = (0..graph.params().len()).map(|p| graph.local_len(p)).collect();
        let names = graph.params().iter().map(|param| unit_name(&param.name));
        let mut units: Vec<(Option<&str>, Unit)> = Vec::new();
        for (p, name) in names.enumerate() {
            match units.last_mut() {
                Some((last, unit)) if *last == name => {
                    unit.params.end = p + 1;
                    unit.len += lens[p];
                }
                _ => units.push((name, Unit { params: p..p + 1, len: lens[p] })),
            }
        }
        let units: Vec<Unit> = units.into_iter().map(|(_, unit)| unit).collect();
        let mut all = Self { units, lens, rank, slices: Vec::new(), of_unit: Vec::new() };
        for unit in 0..all.units.len() {
            let first = all.slices.len();
            let own = all.slices_of(unit, rank.rank);
            all.slices.extend(own);
            all.of_unit.push(first..all.slices.len());
        }
        all
    }

    /// The units in order.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// This rank of the data axis.
    pub fn rank(&self) -> Shard {
        self.rank
    }

    /// What this rank keeps, in the order of the parameters.
    pub fn slices(&self) -> &[Slice] {
        &self.slices
    }

    /// Those of `unit` among them.
    pub fn slices_in(&self, unit: usize) -> Range<usize> {
        self.of_unit[unit].clone()
    }

    /// Number of elements of parameter `p`.
    pub fn param_len(&self, p: usize) -> usize {
        self.lens[p]
    }

    /// Elements of a unit's piece; the last pieces may have fewer.
    pub fn piece_len(&self, unit: usize) -> usize {
        self.units[unit].len.div_ceil(self.rank.size)
    }

    /// What rank `rank` keeps of `unit`.
    pub fn slices_of(&self, unit: usize, rank: usize) -> Vec<Slice> {
        let piece = self.piece_len(unit);
        let (from, to) = (rank * piece, (rank + 1) * piece);
        let mut start = 0;
        let mut slices = Vec::new();
        for p in self.units[unit].params.clone() {
            let end = start + self.lens[p];
            let (first, last) = (from.max(start), to.min(end));
            if first < last {
                slices.push(Slice { param: p, range: first - start..last - start });
            }
            start = end;
        }
        slices
    }

    /// The slices of a tensor for each parameter.
    pub fn cut(&self, whole: &[Vec<f32>]) -> Vec<Vec<f32>> {
        self.slices.iter().map(|slice| whole[slice.param][slice.range.clone()].to_vec()).collect()
    }
}

/// `blocks.3` of `blocks.3.attn.qkv.weight`; none where a parameter is of no block.
fn unit_name(name: &str) -> Option<&str> {
    let rest = name.strip_prefix("blocks.")?;
    let digits = rest.find('.')?;
    Some(&name[.."blocks.".len() + digits])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::ParamSpec;
    use crate::autograd::graph::Init;

    fn graph() -> Graph {
        let mut graph = Graph::new();
        for (name, len) in
            [("patch", 5), ("blocks.0.a", 4), ("blocks.0.b", 3), ("blocks.1.a", 2), ("norm", 1), ("head", 6)]
        {
            let (name, init) = (name.into(), Init::Constant(0.0));
            graph.param(ParamSpec { name, shape: vec![len], init, decay: true, head: false });
        }
        graph
    }

    #[test]
    fn blocks_are_units() {
        let units = Units::new(&graph(), Shard::WHOLE);
        let expected = [(0..1, 5), (1..3, 7), (3..4, 2), (4..6, 7)];
        assert_eq!(units.units(), expected.map(|(params, len)| Unit { params, len }));
        assert_eq!(units.slices().len(), 6);
        assert_eq!(units.slices_in(1), 1..3);
        assert_eq!(unit_name("blocks.10.attn.qkv.weight"), Some("blocks.10"));
    }

    #[test]
    fn pieces_are_a_partition() {
        for size in 1..=9 {
            let mut seen: Vec<Vec<u32>> = graph().params().iter().map(|p| vec![0; p.len()]).collect();
            for rank in 0..size {
                let units = Units::new(&graph(), Shard { rank, size });
                for (i, slice) in units.slices().iter().enumerate() {
                    seen[slice.param][slice.range.clone()].iter_mut().for_each(|n| *n += 1);
                    let unit = (0..units.units().len()).find(|u| units.slices_in(*u).contains(&i)).unwrap();
                    assert!(units.units()[unit].params.contains(&slice.param));
                }
            }
            assert!(seen.iter().flatten().all(|n| *n == 1), "{size} ranks: {seen:?}");
        }
    }
}
