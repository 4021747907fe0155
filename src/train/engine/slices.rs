//! What a rank keeps of a training's tensors, and sums over ranks.

use std::rc::Rc;

use super::state::{StateKind, StateSource, Wanted, portions};
use crate::autograd::{Graph, Shard, Split};
use crate::error::Result;
use crate::parallel::zero::{Slice, Unit, Units};
use crate::parallel::{Group, MeshGroups};
use crate::train::optimizer::{OwnSlice, Sums, squares};
use crate::train::step::StepOutcome;

/// This rank's slices of the parameters, and of all tensors of their shape.
pub(super) struct Slices {
    ranks: Rc<MeshGroups>,
    units: Units,
}

impl Slices {
    /// Of the parameters of `graph`, which is this rank's part of the model.
    pub(super) fn new(graph: &Graph, ranks: Rc<MeshGroups>) -> Self {
        let data = Shard { rank: ranks.data.rank(), size: ranks.data.size() };
        Self { units: Units::new(graph, data), ranks }
    }

    /// The groups of this rank.
    pub(super) fn ranks(&self) -> &MeshGroups {
        &self.ranks
    }

    /// What the data axis shares out.
    pub(super) fn units(&self) -> &Units {
        &self.units
    }

    /// The slices as an optimiser takes them.
    pub(super) fn own(&self, graph: &Graph) -> Vec<OwnSlice> {
        let first = self.ranks.tensor.rank() == 0;
        let own = |slice: &Slice| {
            let Wanted { param, runs } = wanted(graph, slice);
            OwnSlice { param, runs, counted: first || !graph.split(param).is_replicated() }
        };
        self.units.slices().iter().map(own).collect()
    }

    /// This rank's slices of the tensors of `kind`.
    ///
    /// # Errors
    /// Those of the source.
    pub(super) fn read(
        &self,
        graph: &Graph,
        source: &dyn StateSource,
        kind: StateKind,
    ) -> Result<Vec<Vec<f32>>> {
        let wanted: Vec<Wanted> = self.units.slices().iter().map(|slice| wanted(graph, slice)).collect();
        if self.ranks.world.size() == 1 {
            return source.read(kind, &wanted);
        }
        let units = self.units.units();
        let size = |unit: &Unit| unit.params.clone().map(|p| graph.params()[p].len()).sum();
        let mut slices = Vec::with_capacity(wanted.len());
        for portion in portions(units.iter().map(size)) {
            let in_portion =
                self.units.slices_in(portion.start).start..self.units.slices_in(portion.end - 1).end;
            slices.extend(source.read(kind, &wanted[in_portion])?);
        }
        Ok(slices)
    }

    /// Sums what the ranks of the tensor axis have computed summands of.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    pub(super) fn sum_partial(&self, graph: &Graph, grads: &mut [Vec<f32>]) -> Result<()> {
        if self.ranks.tensor.size() == 1 {
            return Ok(());
        }
        let summed = |slice: &Slice| graph.split(slice.param) == Split::Summed;
        let partial = |grads: &mut [Vec<f32>], f: &mut dyn FnMut(&mut Vec<f32>)| {
            grads
                .iter_mut()
                .zip(self.units.slices())
                .filter(|(_, slice)| summed(slice))
                .for_each(|(g, _)| f(g));
        };
        let mut all = Vec::new();
        partial(grads, &mut |grad| all.extend_from_slice(grad));
        self.ranks.tensor.all_reduce(&mut all)?;
        let mut rest = &all[..];
        partial(grads, &mut |grad| {
            let (head, tail) = rest.split_at(grad.len());
            grad.copy_from_slice(head);
            rest = tail;
        });
        Ok(())
    }

    /// The norm of the gradients of the whole model, what several ranks hold counted once.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    pub(super) fn norm(&self, graph: &Graph, grads: &[Vec<f32>]) -> Result<f64> {
        let first = self.ranks.tensor.rank() == 0;
        let counts = |slice: &Slice| first || !graph.split(slice.param).is_replicated();
        let own = squares(grads).into_iter().zip(self.units.slices()).filter(|(_, slice)| counts(slice));
        let mut sum = [own.map(|(squares, _)| squares).sum::<f64>()];
        self.ranks.world.all_reduce(&mut sum)?;
        Ok(sum[0].sqrt())
    }

    /// Adds the sums of all ranks.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    pub(super) fn sum(&self, sums: Sums<'_>) -> Result<()> {
        match sums {
            Sums::Squares(squares) => self.ranks.world.all_reduce(squares),
            Sums::Statistics(sums) => self.ranks.world.all_reduce(sums),
        }
    }
}

/// Where a slice of what this rank of the tensor axis has lies in the whole parameter.
pub(super) fn wanted(graph: &Graph, Slice { param, range }: &Slice) -> Wanted {
    let shape = &graph.params()[*param].shape;
    Wanted { param: *param, runs: graph.split(*param).runs_of(shape, graph.shard(), range.clone()) }
}

/// What the data axis did in a step, from what each of its ranks did.
///
/// # Errors
/// A rank that is gone or silent.
pub(super) fn sum_outcome(data: &Group, own: StepOutcome) -> Result<StepOutcome> {
    let recognised = own.accuracy * own.images as f64;
    let counts = [own.images as f64, own.tokens as f64, own.budget as f64];
    let mut sums = [own.loss, recognised, own.flops, counts[0], counts[1], counts[2]];
    data.all_reduce(&mut sums)?;
    let [loss, recognised, flops, images, tokens, budget] = sums;
    Ok(StepOutcome {
        loss,
        accuracy: recognised / images.max(1.0),
        images: images as u64,
        tokens: tokens as usize,
        budget: budget as usize,
        flops,
        ..own
    })
}
