//! What a rank keeps of a training's tensors, and sums over ranks.

use std::borrow::Cow;
use std::rc::Rc;

use crate::autograd::{Graph, ParamSpec, Shard, Split};
use crate::error::Result;
use crate::parallel::zero::{Slice, Units};
use crate::parallel::{Group, MeshGroups};
use crate::train::optimizer::squares;
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

    /// The parameter of each slice, and the number of elements.
    pub(super) fn specs<'a>(
        &'a self,
        params: &'a [ParamSpec],
    ) -> impl Iterator<Item = (&'a ParamSpec, usize)> {
        self.units.slices().iter().map(|slice| (&params[slice.param], slice.range.len()))
    }

    /// The slices of a tensor for each parameter of the whole model.
    pub(super) fn cut(&self, graph: &Graph, whole: Cow<'_, [Vec<f32>]>) -> Vec<Vec<f32>> {
        if self.ranks.world.size() == 1 {
            return whole.into_owned();
        }
        let mut part: (usize, Vec<f32>) = (usize::MAX, Vec::new());
        let slice = |Slice { param, range }: &Slice| {
            if part.0 != *param {
                let shape = &graph.params()[*param].shape;
                part = (*param, graph.split(*param).part(&whole[*param], shape, graph.shard()));
            }
            part.1[range.clone()].to_vec()
        };
        self.units.slices().iter().map(slice).collect()
    }

    /// The inverse, on rank 0, from the slices of all ranks; nothing on the others. All ranks call it.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    pub(super) fn merge(&self, graph: &Graph, own: &[Vec<f32>]) -> Result<Vec<Vec<f32>>> {
        let (world, mesh) = (&self.ranks.world, self.ranks.mesh);
        if world.rank() != 0 {
            world.post(0, &own.concat())?;
            return Ok(Vec::new());
        }
        let mut whole: Vec<Vec<f32>> = graph.params().iter().map(|param| vec![0.0; param.len()]).collect();
        for tensor in 0..mesh.tensor() {
            let mut parts: Vec<Vec<f32>> =
                (0..whole.len()).map(|p| vec![0.0; self.units.param_len(p)]).collect();
            for data in 0..mesh.data() {
                let slices: Vec<Slice> =
                    (0..self.units.units().len()).flat_map(|unit| self.units.slices_of(unit, data)).collect();
                let rank = data * mesh.tensor() + tensor;
                let received = if rank == 0 {
                    own.concat()
                } else {
                    let mut values = vec![0.0; slices.iter().map(|slice| slice.range.len()).sum()];
                    world.receive(rank, &mut values)?;
                    values
                };
                let mut rest = &received[..];
                for slice in slices {
                    let (head, tail) = rest.split_at(slice.range.len());
                    parts[slice.param][slice.range].copy_from_slice(head);
                    rest = tail;
                }
            }
            let shard = Shard { rank: tensor, size: mesh.tensor() };
            for (p, part) in parts.iter().enumerate() {
                let split = graph.split(p);
                if tensor == 0 || !split.is_replicated() {
                    split.place(&mut whole[p], part, &graph.params()[p].shape, shard);
                }
            }
        }
        Ok(whole)
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

    /// Replaces two sums for each slice by those of its whole parameter, what several ranks hold counted once.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    pub(super) fn sum_squares(&self, graph: &Graph, squares: &mut [[f64; 2]]) -> Result<()> {
        let first = self.ranks.tensor.rank() == 0;
        let mut sums = vec![0.0; 2 * graph.params().len()];
        for (slice, own) in self.units.slices().iter().zip(&*squares) {
            if first || !graph.split(slice.param).is_replicated() {
                sums[2 * slice.param..][..2].copy_from_slice(own);
            }
        }
        self.ranks.world.all_reduce(&mut sums)?;
        for (slice, own) in self.units.slices().iter().zip(squares) {
            own.copy_from_slice(&sums[2 * slice.param..][..2]);
        }
        Ok(())
    }
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
