//! Where the rows and columns that Adafactor sums on a device lie in whole parameters.

use std::ops::Range;

use crate::autograd::Graph;
use crate::autograd::device::ParamLayout;
use crate::cpu::optim::adafactor::Factoring;
use crate::kernels::optim::{Lines, WholeSpec};

/// What is kept of each parameter, and the lines of each tensor of an arena: `tensors` has their parameters, and which of
/// the padded elements of this rank's part of them they are.
pub(super) fn lines(
    graph: &Graph,
    layout: &ParamLayout,
    tensors: &[Option<(usize, Range<usize>)>],
) -> (Vec<WholeSpec>, Vec<Lines>) {
    let factorings: Vec<Factoring> = graph.params().iter().map(|param| Factoring::of(&param.shape)).collect();
    let mut len = 0;
    let firsts: Vec<usize> = factorings
        .iter()
        .map(|factoring| {
            len += factoring.len();
            len - factoring.len()
        })
        .collect();
    let whole = |factoring: &Factoring| match factoring.factored() {
        Some(shape) => WholeSpec::Matrix(shape),
        None => WholeSpec::Elements(factoring.len()),
    };
    let of_tensor = |tensor: &Option<(usize, Range<usize>)>| match tensor {
        Some((p, elements)) => lines_of(graph, layout, (*p, elements.clone()), (factorings[*p], firsts[*p])),
        None => Lines::None,
    };
    (factorings.iter().map(whole).collect(), tensors.iter().map(of_tensor).collect())
}

fn lines_of(
    graph: &Graph,
    layout: &ParamLayout,
    (p, elements): (usize, Range<usize>),
    (factoring, first): (Factoring, usize),
) -> Lines {
    let ([rows, cols], stride) = (layout.dense(p), layout.shape(p)[1]);
    let (split, shape) = (graph.split(p), &graph.params()[p].shape);
    let runs = |dense: Range<usize>| split.runs_of(shape, graph.shard(), dense);
    let Some([whole_rows, whole_cols]) = factoring.factored() else {
        let whole: Vec<usize> = runs(0..rows * cols).into_iter().flatten().collect();
        let place = |at: usize| {
            let (row, col) = (at / stride, at % stride);
            (row < rows && col < cols).then(|| first + whole[row * cols + col])
        };
        return Lines::Elements(elements.map(place).collect());
    };
    let own = elements.start / stride..elements.end.div_ceil(stride);
    let dense = own.start.min(rows)..own.end.min(rows);
    // Where each of these rows begins in the whole.
    let (mut at, mut of_rows) = (dense.start * cols, Vec::with_capacity(own.len()));
    for run in runs(dense.start * cols..dense.end * cols) {
        let begins = (at.next_multiple_of(cols)..at + run.len()).step_by(cols);
        of_rows.extend(begins.map(|begin| Some(first + (run.start + begin - at) / whole_cols)));
        at += run.len();
    }
    of_rows.resize(own.len(), None);
    let place = |element: usize| Some(first + whole_rows + element % whole_cols);
    let mut columns: Vec<Option<usize>> = runs(0..cols).into_iter().flatten().map(place).collect();
    columns.resize(stride, None);
    Lines::Matrix { elements, rows: of_rows, columns }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::autograd::device::{Element, PieceLayout};
    use crate::autograd::graph::{Extent, Init};
    use crate::autograd::{ParamSpec, Shard, Split, gemm};
    use crate::parallel::zero::Units;

    /// A padded matrix whose rows the tensor axis shares out in three segments, and a vector beside it.
    #[test]
    fn lines_of_all_ranks_are_those_of_the_whole() {
        const ROWS: usize = 60;
        for (split, tensor, data) in [
            (Split::Whole, 1, 1),
            (Split::Whole, 1, 3),
            (Split::Rows(3), 2, 1),
            (Split::Rows(3), 2, 5),
            (Split::Columns, 2, 1),
            (Split::Columns, 2, 3),
        ] {
            let mut seen = vec![0; ROWS + 36 + 12];
            for rank in 0..tensor * data {
                let shard = Shard { rank: rank / data, size: tensor };
                let mut graph = Graph::of_shard(shard);
                let mut param = |name: &str, shape: &[usize], split| {
                    let (name, shape) = (name.into(), shape.to_vec());
                    let init = Init::Constant(0.0);
                    graph.param_split(ParamSpec { name, shape, init, decay: true, head: false }, split)
                };
                let (weight, _) = (param("w", &[ROWS, 36], split), param("b", &[12], Split::Whole));
                let cols = graph.info(weight).cols;
                let x = graph.activation(4, cols, Extent::Fixed);
                gemm::linear(&mut graph, x, weight, None);
                let units = Units::new(&graph, Shard { rank: rank % data, size: data });
                let elements = [Element::Bf16, Element::F32];
                let layout = Arc::new(PieceLayout::new(&graph, &units, &elements, &|_| 0.0).unwrap());
                let (wholes, lines) = lines(&graph, layout.params(), layout.slices());
                assert_eq!(wholes, [WholeSpec::Matrix([ROWS, 36]), WholeSpec::Elements(12)]);
                for (lines, range) in lines.iter().zip(layout.arena().ranges()) {
                    let places = match lines {
                        Lines::None => continue,
                        Lines::Elements(places) => {
                            assert_eq!(places.len(), range.len());
                            places.clone()
                        }
                        Lines::Matrix { elements, rows, columns } => {
                            assert_eq!(elements.len(), range.len());
                            assert_eq!(columns.iter().flatten().count(), cols);
                            rows.iter().chain(columns).copied().collect()
                        }
                    };
                    places.into_iter().flatten().for_each(|place| seen[place] += 1);
                }
            }
            assert!(seen.iter().all(|&n| n > 0), "{split:?}, {tensor} x {data}: {seen:?}");
            // Without a tensor axis rows are on one rank, but for those that are cut, and vectors on one.
            if tensor == 1 && data == 1 {
                assert!(seen.iter().all(|&n| n == 1));
            }
        }
    }
}
