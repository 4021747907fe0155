//! States of a training that are drawn, or in memory as a whole.

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use super::state::{Average, StateKind, StateParts, StateSource, Wanted, gather};
use crate::autograd::{ParamSpec, Split};
use crate::error::{Error, Result};
use crate::nn::init::initial;
use crate::parallel::MeshGroups;
use crate::parallel::zero::Slice;
use crate::recipe::OptimizerKind;

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

    fn statistics(&self, lens: &[usize]) -> Result<Vec<Vec<f32>>> {
        Ok(lens.iter().map(|&len| vec![0.0; len]).collect())
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
    /// Second moments; empty where elements have none.
    pub v: Cow<'a, [Vec<f32>]>,
    /// What Adafactor keeps of the second moments of each parameter; empty with other optimisers.
    pub statistics: Cow<'a, [Vec<f32>]>,
    /// Steps of the optimiser.
    pub optimizer_step: u64,
}

impl TrainState<'static> {
    /// The state of AdamW or LAMB before the first step: `weights`, which are their own average where one is kept, and
    /// zero moments.
    pub fn fresh(weights: Vec<Vec<f32>>, keep_average: bool) -> Self {
        let zeros: Vec<Vec<f32>> = weights.iter().map(|w| vec![0.0; w.len()]).collect();
        Self {
            ema: keep_average.then(|| weights.clone().into()),
            weights: weights.into(),
            m: zeros.clone().into(),
            v: zeros.into(),
            statistics: Vec::new().into(),
            optimizer_step: 0,
        }
    }

    /// All that a source has of a model of `params` that AdamW or LAMB trains.
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
            statistics: Vec::new().into(),
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
            v: if state.keeps_second() { whole(StateKind::Second)? } else { Vec::new().into() },
            statistics: if state.ranks().is_first() { state.statistics()?.into() } else { Vec::new().into() },
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

    fn statistics(&self, lens: &[usize]) -> Result<Vec<Vec<f32>>> {
        match self.statistics.iter().map(Vec::len).eq(lens.iter().copied()) {
            true => Ok(self.statistics.to_vec()),
            false => Err(Error::usage("the state is not of this model trained with Adafactor: give its own")),
        }
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
        let second = (!state.v.is_empty()).then_some(&state.v);
        let all = [Some(&state.weights), state.ema.as_ref(), Some(&state.m), second];
        let statistics = OptimizerKind::Adafactor.factorings(params);
        let statistics = statistics.iter().map(|factoring| factoring.len());
        let known = state.statistics.is_empty() || state.statistics.iter().map(Vec::len).eq(statistics);
        match known && all.into_iter().flatten().all(|tensors| fits(tensors)) {
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

    fn keeps_second(&self) -> bool {
        !self.state.v.is_empty()
    }

    fn statistics(&self) -> Result<Vec<Vec<f32>>> {
        Ok(self.state.statistics.to_vec())
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
