//! State of a training: where it comes from, and how ranks hold it.
//!
//! A model's state may be larger than what a rank can hold. So it comes parameter by parameter, of which a rank takes
//! its slices ([`StateSource`]), and is handed over unit by unit ([`StateParts`], [`gather`]).

use std::ops::Range;

use crate::autograd::{ParamSpec, Shard, Split};
use crate::error::Result;
use crate::parallel::MeshGroups;
use crate::parallel::zero::Slice;

/// What is kept of every parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateKind {
    /// Weights that the optimiser changes.
    Weights,
    /// Moving average of the weights.
    Average,
    /// First moments.
    First,
    /// Second moments of the elements, where the optimiser keeps them.
    Second,
}

/// The moving average of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Average {
    /// None is kept.
    None,
    /// It is the weights, so far.
    Weights,
    /// Tensors of its own.
    Own,
}

/// Elements of a tensor that are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Place of the parameter.
    pub param: usize,
    /// Elements of the whole tensor, rising.
    pub runs: Vec<Range<usize>>,
}

/// Where the state of a training comes from.
pub trait StateSource {
    /// Steps of the optimiser.
    fn optimizer_step(&self) -> u64;

    /// Whether there is a moving average.
    fn average(&self) -> Average;

    /// What Adafactor keeps of the second moments of each whole parameter ([`Factoring`]), of so many numbers each.
    ///
    /// [`Factoring`]: crate::cpu::optim::adafactor::Factoring
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    fn statistics(&self, lens: &[usize]) -> Result<Vec<Vec<f32>>>;

    /// What is asked for of the tensors of `kind`, one vector for each.
    ///
    /// # Errors
    /// A file that cannot be read; tensors of another model.
    fn read(&self, kind: StateKind, wanted: &[Wanted]) -> Result<Vec<Vec<f32>>>;
}

/// The state of a training as its ranks hold it. Every rank knows what each of them holds.
pub trait StateParts {
    /// The ranks.
    fn ranks(&self) -> &MeshGroups;

    /// Names and shapes of the whole parameters.
    fn params(&self) -> &[ParamSpec];

    /// How the tensor axis shares out a parameter.
    fn split(&self, param: usize) -> Split;

    /// Steps of the optimiser.
    ///
    /// # Errors
    /// A failed device.
    fn optimizer_step(&self) -> Result<u64>;

    /// Whether there is a moving average.
    fn keeps_average(&self) -> bool;

    /// Whether every element has a second moment.
    fn keeps_second(&self) -> bool;

    /// What Adafactor keeps of the second moments of each whole parameter, on every rank the same; nothing with other
    /// optimisers.
    ///
    /// # Errors
    /// A failed device.
    fn statistics(&self) -> Result<Vec<Vec<f32>>>;

    /// Parameters of each unit, in order. No rank should have to hold more than one beside its own.
    fn units(&self) -> Vec<Range<usize>>;

    /// What rank `data` of the data axis holds of a unit: one slice of a parameter at most.
    fn slices_of(&self, unit: usize, data: usize) -> Vec<Slice>;

    /// Hands over what this rank holds of a unit, in the order of [`slices_of`](Self::slices_of).
    ///
    /// # Errors
    /// A failed device; those of `take`.
    fn read(
        &self,
        kind: StateKind,
        unit: usize,
        take: &mut dyn FnMut(&Slice, &[f32]) -> Result<()>,
    ) -> Result<()>;
}

/// What `rank` holds of a unit and none before it does: what the tensor axis does not share out counts for its first
/// rank.
pub fn distinct(state: &dyn StateParts, unit: usize, rank: usize) -> Vec<Slice> {
    let (data, tensor) = state.ranks().mesh.coordinates(rank);
    let mut slices = state.slices_of(unit, data);
    slices.retain(|slice| tensor == 0 || !state.split(slice.param).is_replicated());
    slices
}

/// Hands over what this rank holds of a unit and none before it does.
///
/// # Errors
/// A failed device; those of `take`.
pub fn read_distinct(
    state: &dyn StateParts,
    kind: StateKind,
    unit: usize,
    take: &mut dyn FnMut(&Slice, &[f32]) -> Result<()>,
) -> Result<()> {
    let first = state.ranks().tensor.rank() == 0;
    state.read(kind, unit, &mut |slice, values| match first || !state.split(slice.param).is_replicated() {
        true => take(slice, values),
        false => Ok(()),
    })
}

/// Hands the tensors of `kind` to `take`, on the first rank alone, whole and in order. All ranks call it, and all
/// return the error of `take`, after which they are whole.
///
/// # Errors
/// A rank that is gone or silent; a failed device.
pub fn gather(
    state: &dyn StateParts,
    kind: StateKind,
    take: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
) -> Result<Result<()>> {
    let (ranks, units) = (state.ranks(), state.units());
    if ranks.is_alone() {
        let mut unit =
            |unit| state.read(kind, unit, &mut |slice: &Slice, values: &[f32]| take(slice.param, values));
        return Ok((0..units.len()).try_for_each(&mut unit));
    }
    let mut taken = Ok(());
    for (unit, params) in units.into_iter().enumerate() {
        // No rank sends before the first has taken what was sent before: of more than a unit there is no room.
        if let Err(error) = ranks.agree(taken)? {
            return Ok(Err(error));
        }
        let whole = gather_unit(state, kind, unit, params.clone())?;
        taken = params.zip(&whole).try_for_each(|(p, values)| take(p, values));
    }
    ranks.agree(taken)
}

/// The tensors of a unit on the first rank; nothing on others.
fn gather_unit(
    state: &dyn StateParts,
    kind: StateKind,
    unit: usize,
    params: Range<usize>,
) -> Result<Vec<Vec<f32>>> {
    let ranks = state.ranks();
    let (world, mesh) = (&ranks.world, ranks.mesh);
    let mut own = Vec::new();
    read_distinct(state, kind, unit, &mut |_, values| {
        own.extend_from_slice(values);
        Ok(())
    })?;
    if !ranks.is_first() {
        if !own.is_empty() {
            world.post(0, &own)?;
        }
        return Ok(Vec::new());
    }
    let mut whole: Vec<Vec<f32>> = params.clone().map(|p| vec![0.0; state.params()[p].len()]).collect();
    for rank in 0..world.size() {
        let slices = distinct(state, unit, rank);
        if rank > 0 {
            own = vec![0.0; slices.iter().map(|slice| slice.range.len()).sum()];
            if !own.is_empty() {
                world.receive(rank, &mut own)?;
            }
        }
        let shard = Shard { rank: mesh.coordinates(rank).1, size: mesh.tensor() };
        let mut rest = &own[..];
        for Slice { param, range } in slices {
            for run in state.split(param).runs_of(&state.params()[param].shape, shard, range) {
                let (head, tail) = rest.split_at(run.len());
                whole[param - params.start][run].copy_from_slice(head);
                rest = tail;
            }
        }
    }
    Ok(whole)
}

/// Elements that may be in memory at a time where there are no larger units: enough of them to draw on all cores.
const PORTION: usize = 1 << 26;

/// Neighbours of these sizes that together stay below [`PORTION`], or are one.
pub(super) fn portions(sizes: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let (mut portions, mut sum): (Vec<Range<usize>>, usize) = (Vec::new(), 0);
    for (i, size) in sizes.enumerate() {
        match portions.last_mut() {
            Some(portion) if sum + size <= PORTION => {
                portion.end = i + 1;
                sum += size;
            }
            _ => {
                portions.push(i..i + 1);
                sum = size;
            }
        }
    }
    portions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portions_are_full_or_one() {
        let sizes = [PORTION / 2, PORTION / 2, 1, 2 * PORTION, 3, 4];
        assert_eq!(portions(sizes.into_iter()), [0..2, 2..3, 3..4, 4..6]);
        assert!(portions([].into_iter()).is_empty());
    }
}
