//! A rank's pieces of the parameters on the CPU device.

use bytemuck::Pod;

use super::schedule::{Action, Schedule};
use super::units::Units;
use crate::autograd::ParamStore;
use crate::cpu::real::Real;
use crate::cpu::simd::add_assign;
use crate::error::Result;
use crate::parallel::Group;

/// Groups of the data axis for weights and gradients, whose messages overtake one another.
#[derive(Debug)]
pub struct Channels {
    weights: Group,
    gradients: Group,
}

impl Channels {
    /// Of the ranks of the data axis.
    ///
    /// # Errors
    /// None but those of [`Group::subgroup`].
    pub fn new(data: &Group) -> Result<Self> {
        let all: Vec<usize> = (0..data.size()).collect();
        Ok(Self { weights: data.subgroup("weights", &all)?, gradients: data.subgroup("gradients", &all)? })
    }

    /// Bytes sent so far to all ranks.
    pub fn sent(&self) -> u64 {
        self.weights.sent().iter().chain(&self.gradients.sent()).sum()
    }
}

/// Gathers the weights that a run needs, and sums its gradients into pieces.
pub struct PiecedStore<'a, R> {
    channels: &'a Channels,
    units: &'a Units,
    schedule: &'a Schedule,
    /// One for each slice.
    pieces: &'a [Vec<R>],
    /// Sums of gradients, one for each slice; none where there are no gradients.
    sums: &'a mut [Vec<R>],
    /// Parameters that are there, whole.
    params: Vec<Vec<R>>,
    grads: Vec<Vec<R>>,
    /// The unit whose gradients are on their way, and this rank's own summand.
    reducing: Option<(usize, Vec<R>)>,
}

impl<'a, R: Real + Pod> PiecedStore<'a, R> {
    /// Over this rank's slices of the weights; gradients are added to `sums`.
    pub fn new(
        channels: &'a Channels,
        units: &'a Units,
        schedule: &'a Schedule,
        pieces: &'a [Vec<R>],
        sums: &'a mut [Vec<R>],
    ) -> Self {
        let params: Vec<Vec<R>> =
            units.units().iter().flat_map(|unit| unit.params.clone()).map(|_| Vec::new()).collect();
        let grads = params.clone();
        Self { channels, units, schedule, pieces, sums, params, grads, reducing: None }
    }

    /// Waits for the sums that are still on their way.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    pub fn finish(&mut self) -> Result<()> {
        let Some((unit, own)) = self.reducing.take() else { return Ok(()) };
        let group = &self.channels.gradients;
        let mut summand = vec![R::ZERO; own.len()];
        let mut total = vec![R::ZERO; own.len()];
        // In the order of the ranks, so that sums do not depend on who takes them.
        for rank in 0..group.size() {
            if rank == group.rank() {
                add_assign(&mut total, &own);
            } else {
                group.receive(rank, &mut summand)?;
                add_assign(&mut total, &summand);
            }
        }
        let mut rest = &total[..];
        for sum in &mut self.sums[self.units.slices_in(unit)] {
            let (head, tail) = rest.split_at(sum.len());
            add_assign(sum, head);
            rest = tail;
        }
        Ok(())
    }

    /// Sends this rank's piece to the others.
    fn post(&self, unit: usize) -> Result<()> {
        let group = &self.channels.weights;
        let piece = self.pieces[self.units.slices_in(unit)].concat();
        group.others().try_for_each(|to| group.post(to, &piece))
    }

    fn gather(&mut self, unit: usize) -> Result<()> {
        let group = &self.channels.weights;
        for p in self.units.units()[unit].params.clone() {
            self.params[p] = vec![R::ZERO; self.units.param_len(p)];
        }
        for rank in 0..group.size() {
            let slices = self.units.slices_of(unit, rank);
            let len = slices.iter().map(|slice| slice.range.len()).sum();
            let mut piece;
            if rank == group.rank() {
                piece = self.pieces[self.units.slices_in(unit)].concat();
            } else {
                piece = vec![R::ZERO; len];
                group.receive(rank, &mut piece)?;
            }
            let mut rest = &piece[..];
            for slice in slices {
                let (head, tail) = rest.split_at(slice.range.len());
                self.params[slice.param][slice.range].copy_from_slice(head);
                rest = tail;
            }
        }
        Ok(())
    }

    /// Sends each rank its part of the gradients, once those of the unit before have come.
    fn reduce(&mut self, unit: usize) -> Result<()> {
        self.finish()?;
        let group = &self.channels.gradients;
        let part = |rank: usize| -> Vec<R> {
            let slices = self.units.slices_of(unit, rank);
            let mut part = Vec::with_capacity(slices.iter().map(|slice| slice.range.len()).sum());
            for slice in slices {
                match self.grads[slice.param].get(slice.range.clone()) {
                    Some(grad) => part.extend_from_slice(grad),
                    // Nothing flows to the parameter.
                    None => part.resize(part.len() + slice.range.len(), R::ZERO),
                }
            }
            part
        };
        group.others().try_for_each(|to| group.post(to, &part(to)))?;
        self.reducing = Some((unit, part(group.rank())));
        for p in self.units.units()[unit].params.clone() {
            self.grads[p] = Vec::new();
        }
        Ok(())
    }

    fn act(&mut self, action: Action) -> Result<()> {
        let unit = |visit: usize| self.schedule.visits()[visit].unit;
        match action {
            Action::Post(visit) => self.post(unit(visit)),
            Action::Await(visit) => self.gather(unit(visit)),
            Action::Release(visit) => {
                for p in self.units.units()[unit(visit)].params.clone() {
                    self.params[p] = Vec::new();
                }
                Ok(())
            }
            // Gradients begin as zeros when they are taken.
            Action::Clear(_) => Ok(()),
            Action::Reduce(unit) => self.reduce(unit),
        }
    }
}

impl<R: Real + Pod> ParamStore<R> for PiecedStore<'_, R> {
    fn before(&mut self, at: usize) -> Result<()> {
        let schedule = self.schedule;
        schedule.before(at).iter().try_for_each(|action| self.act(*action))
    }

    fn param(&self, p: usize) -> &[R] {
        &self.params[p]
    }

    fn take_grad(&mut self, p: usize) -> Vec<R> {
        match std::mem::take(&mut self.grads[p]) {
            grad if grad.is_empty() => vec![R::ZERO; self.units.param_len(p)],
            grad => grad,
        }
    }

    fn put_grad(&mut self, p: usize, grad: Vec<R>) {
        self.grads[p] = grad;
    }

    fn after(&mut self, at: usize) -> Result<()> {
        let schedule = self.schedule;
        schedule.after(at).iter().try_for_each(|action| self.act(*action))
    }
}
