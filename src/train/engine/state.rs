//! State of a training: where it comes from, how ranks hold it, all of it in memory.
//!
//! A model's state may be larger than what a rank can hold. So it comes parameter by parameter, of which a rank takes
//! its slices ([`StateSource`]), and is handed over unit by unit ([`StateParts`], [`gather`]).

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use crate::autograd::{ParamSpec, Shard, Split};
use crate::error::{Error, Result};
use crate::nn::init::initial;
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
    /// Second moments.
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

/// The state before the first step: weights, which are their own average where one is kept, and zero moments.
#[derive(Clone, Debug)]
pub struct Fresh {
    params: Vec<ParamSpec>,
    seed: u64,
    given: Option<Vec<Vec<f32>>>,
    keep_average: bool,
}

impl Fresh {
    /// Weights that are drawn when they are asked for.
    pub fn drawn(params: &[ParamSpec], seed: u64, keep_average: bool) -> Self {
        Self { params: params.to_vec(), seed, given: None, keep_average }
    }

    /// These weights.
    pub fn given(params: &[ParamSpec], weights: Vec<Vec<f32>>, keep_average: bool) -> Self {
        Self { params: params.to_vec(), seed: 0, given: Some(weights), keep_average }
    }
}

impl StateSource for Fresh {
    fn optimizer_step(&self) -> u64 {
        0
    }

    fn average(&self) -> Average {
        if self.keep_average { Average::Weights } else { Average::None }
    }

    fn read(&self, kind: StateKind, wanted: &[Wanted]) -> Result<Vec<Vec<f32>>> {
        let zeros = |wanted: &Wanted| vec![0.0; wanted.runs.iter().map(Range::len).sum()];
        match (kind, &self.given) {
            (StateKind::First | StateKind::Second, _) => Ok(wanted.iter().map(zeros).collect()),
            (_, Some(weights)) => cut_all(weights, wanted),
            (_, None) => {
                let drawn = |wanted: &Wanted| match self.params.get(wanted.param) {
                    Some(param) => cut(initial(param, self.seed).into(), wanted),
                    None => Err(another_model(wanted.param)),
                };
                wanted.par_iter().map(drawn).collect()
            }
        }
    }
}

/// What is wanted of whole tensors in the order of the parameters.
fn cut_all(tensors: &[Vec<f32>], wanted: &[Wanted]) -> Result<Vec<Vec<f32>>> {
    let cut = |wanted: &Wanted| match tensors.get(wanted.param) {
        Some(whole) => cut(whole.as_slice().into(), wanted),
        None => Err(another_model(wanted.param)),
    };
    wanted.iter().map(cut).collect()
}

fn cut(whole: Cow<'_, [f32]>, wanted: &Wanted) -> Result<Vec<f32>> {
    match wanted.runs.as_slice() {
        [all] if *all == (0..whole.len()) => Ok(whole.into_owned()),
        runs if runs.last().is_some_and(|run| run.end > whole.len()) => Err(another_model(wanted.param)),
        runs => {
            let mut values = Vec::with_capacity(runs.iter().map(Range::len).sum());
            runs.iter().for_each(|run| values.extend_from_slice(&whole[run.clone()]));
            Ok(values)
        }
    }
}

fn another_model(param: usize) -> Error {
    Error::usage(format!("parameter {param} of the state does not fit the model: give one of this recipe"))
}

/// All of a state in memory. All tensors are dense and in the order of the parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainState<'a> {
    /// Weights that the optimiser changes.
    pub weights: Cow<'a, [Vec<f32>]>,
    /// Moving average of the weights.
    pub ema: Option<Cow<'a, [Vec<f32>]>>,
    /// First moments.
    pub m: Cow<'a, [Vec<f32>]>,
    /// Second moments.
    pub v: Cow<'a, [Vec<f32>]>,
    /// Steps of the optimiser.
    pub optimizer_step: u64,
}

impl TrainState<'static> {
    /// The state before the first step: `weights`, which are their own average where one is kept, and zero moments.
    pub fn fresh(weights: Vec<Vec<f32>>, keep_average: bool) -> Self {
        let zeros: Vec<Vec<f32>> = weights.iter().map(|w| vec![0.0; w.len()]).collect();
        Self {
            ema: keep_average.then(|| weights.clone().into()),
            weights: weights.into(),
            m: zeros.clone().into(),
            v: zeros.into(),
            optimizer_step: 0,
        }
    }

    /// All that a source has of a model of `params`.
    ///
    /// # Errors
    /// Those of the source.
    pub fn of(source: &dyn StateSource, params: &[ParamSpec]) -> Result<Self> {
        let whole = |(param, spec): (usize, &ParamSpec)| Wanted {
            param,
            runs: std::iter::once(0..spec.len()).collect(),
        };
        let wanted: Vec<Wanted> = params.iter().enumerate().map(whole).collect();
        let read = |kind| source.read(kind, &wanted).map(Into::into);
        Ok(Self {
            weights: read(StateKind::Weights)?,
            ema: match source.average() {
                Average::None => None,
                Average::Weights => Some(read(StateKind::Weights)?),
                Average::Own => Some(read(StateKind::Average)?),
            },
            m: read(StateKind::First)?,
            v: read(StateKind::Second)?,
            optimizer_step: source.optimizer_step(),
        })
    }

    /// All that the ranks hold, on the first of them; nothing on others. All ranks call it.
    ///
    /// # Errors
    /// A rank that is gone or silent; a failed device.
    pub fn gather(state: &dyn StateParts) -> Result<Self> {
        let whole = |kind| -> Result<Cow<'static, [Vec<f32>]>> {
            let mut all = Vec::new();
            gather(state, kind, &mut |_, values| {
                all.push(values.to_vec());
                Ok(())
            })??;
            Ok(all.into())
        };
        Ok(Self {
            weights: whole(StateKind::Weights)?,
            ema: state.keeps_average().then(|| whole(StateKind::Average)).transpose()?,
            m: whole(StateKind::First)?,
            v: whole(StateKind::Second)?,
            optimizer_step: state.optimizer_step()?,
        })
    }
}

impl TrainState<'_> {
    fn tensors(&self, kind: StateKind) -> &[Vec<f32>] {
        match kind {
            StateKind::Weights => &self.weights,
            StateKind::Average => self.ema.as_deref().unwrap_or_default(),
            StateKind::First => &self.m,
            StateKind::Second => &self.v,
        }
    }
}

impl StateSource for TrainState<'_> {
    fn optimizer_step(&self) -> u64 {
        self.optimizer_step
    }

    fn average(&self) -> Average {
        if self.ema.is_some() { Average::Own } else { Average::None }
    }

    fn read(&self, kind: StateKind, wanted: &[Wanted]) -> Result<Vec<Vec<f32>>> {
        cut_all(self.tensors(kind), wanted)
    }
}

/// A state in memory that one rank holds, to be saved.
pub struct Whole<'a> {
    params: &'a [ParamSpec],
    state: &'a TrainState<'a>,
    alone: MeshGroups,
}

impl<'a> Whole<'a> {
    /// Of a model of `params`.
    ///
    /// # Errors
    /// Tensors of another model.
    pub fn new(params: &'a [ParamSpec], state: &'a TrainState<'a>) -> Result<Self> {
        let lens = || params.iter().map(ParamSpec::len);
        let fits = |tensors: &[Vec<f32>]| tensors.iter().map(Vec::len).eq(lens());
        let all = [Some(&state.weights), state.ema.as_ref(), Some(&state.m), Some(&state.v)];
        match all.into_iter().flatten().all(|tensors| fits(tensors)) {
            true => Ok(Self { params, state, alone: MeshGroups::alone() }),
            false => Err(Error::usage("the state is of another model than the parameters: give its own")),
        }
    }
}

impl StateParts for Whole<'_> {
    fn ranks(&self) -> &MeshGroups {
        &self.alone
    }

    fn params(&self) -> &[ParamSpec] {
        self.params
    }

    fn split(&self, _: usize) -> Split {
        Split::Whole
    }

    fn optimizer_step(&self) -> Result<u64> {
        Ok(self.state.optimizer_step)
    }

    fn keeps_average(&self) -> bool {
        self.state.ema.is_some()
    }

    fn units(&self) -> Vec<Range<usize>> {
        (0..self.params.len()).map(|p| p..p + 1).collect()
    }

    fn slices_of(&self, unit: usize, _: usize) -> Vec<Slice> {
        vec![Slice { param: unit, range: 0..self.params[unit].len() }]
    }

    fn read(
        &self,
        kind: StateKind,
        unit: usize,
        take: &mut dyn FnMut(&Slice, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let values = &self.state.tensors(kind)[unit];
        take(&Slice { param: unit, range: 0..values.len() }, values)
    }
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
