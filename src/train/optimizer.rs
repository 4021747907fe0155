//! The optimiser over all parameters of a model: moments, weight-decay groups, clipping.

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::autograd::ParamSpec;
use crate::cpu::optim::adafactor::{self, Adafactor, Factoring};
use crate::cpu::optim::{AdamW, Lamb, Sgd, adamw, lamb_apply, lamb_update, sgd, sum_of_squares};
use crate::recipe::{OptimizerKind, TrainConfig};

/// Optimiser state and settings. Tensors are in the order of the slices of parameters that it was made for.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    moments: Moments,
    /// Steps taken.
    pub step: u64,
    kind: OptimizerKind,
    /// Number of parameters of the model.
    params: usize,
    slices: Vec<OwnSlice>,
    decay: Vec<f64>,
    beta1: f64,
    beta2: f64,
    beta2_power: f64,
    nesterov: bool,
    eps: f64,
    clip: f64,
}

/// What is kept of gradients.
#[derive(Clone, Debug, PartialEq)]
enum Moments {
    /// SGD.
    Momentum(Vec<Vec<f32>>),
    /// AdamW and LAMB: first and second.
    Adam([Vec<Vec<f32>>; 2]),
    /// Adafactor: momentum of the slices, and the statistics of all parameters.
    Factored { m: Vec<Vec<bf16>>, factorings: Vec<Factoring>, v: Vec<Vec<f32>> },
}

/// Elements of a parameter that an optimiser steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnSlice {
    /// Place of the parameter.
    pub param: usize,
    /// Elements of the whole parameter, rising.
    pub runs: Vec<Range<usize>>,
    /// Whether they count here in sums over all ranks: where several have them, the first alone counts them.
    pub counted: bool,
}

impl OwnSlice {
    /// Number of elements.
    fn len(&self) -> usize {
        self.runs.iter().map(Range::len).sum()
    }

    /// The runs, and where they are in the slice.
    fn places(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let mut end = 0;
        self.runs.iter().map(move |run| {
            end += run.len();
            (run.clone(), end - run.len()..end)
        })
    }
}

/// What a step sums over all ranks.
#[derive(Debug)]
pub enum Sums<'a> {
    /// LAMB: squares of each parameter and of its update.
    Squares(&'a mut [f64]),
    /// Adafactor: squared gradients of rows and columns.
    Statistics(&'a mut [f32]),
}

impl OptimizerKind {
    /// Whether every element of a parameter has a second moment of its own.
    pub fn keeps_second(self) -> bool {
        matches!(self, Self::AdamW | Self::Lamb)
    }

    /// What is kept of the second moments of each parameter instead, on every rank; nothing by other optimisers than
    /// Adafactor.
    pub fn factorings(self, params: &[ParamSpec]) -> Vec<Factoring> {
        match self {
            Self::Adafactor => params.iter().map(|param| Factoring::of(&param.shape)).collect(),
            Self::AdamW | Self::Lamb | Self::Sgd => Vec::new(),
        }
    }
}

/// What a step would have done with gradients that are not finite: nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the gradient norm is {norm}")]
pub struct NonFinite {
    /// The global gradient norm: infinite or NaN.
    pub norm: f64,
}

/// Weight decay of `param`. It applies to parameters with `decay`: `head_weight_decay` to those of the head where it
/// is set (not negative), `weight_decay` to the others.
pub fn weight_decay(param: &ParamSpec, config: &TrainConfig) -> f64 {
    match (param.decay, param.head && config.head_weight_decay >= 0.0) {
        (false, _) => 0.0,
        (true, true) => config.head_weight_decay,
        (true, false) => config.weight_decay,
    }
}

/// Sum of squares of each gradient. To be summed in order, so that a norm has the same bits on any number of
/// threads.
pub fn squares(grads: &[Vec<f32>]) -> Vec<f64> {
    grads.par_iter().map(|grad| sum_of_squares(grad)).collect()
}

impl Optimizer {
    /// Zero moments.
    pub fn new(params: &[ParamSpec], config: &TrainConfig) -> Self {
        let all = |(param, spec): (usize, &ParamSpec)| OwnSlice {
            param,
            runs: std::iter::once(0..spec.len()).collect(),
            counted: true,
        };
        Self::sliced(params, params.iter().enumerate().map(all).collect(), config)
    }

    /// The same for slices of `params`, at most one of each.
    pub fn sliced(params: &[ParamSpec], slices: Vec<OwnSlice>, config: &TrainConfig) -> Self {
        let kind = config.optimizer;
        let zeros = || -> Vec<Vec<f32>> { slices.iter().map(|slice| vec![0.0; slice.len()]).collect() };
        let moments = match kind {
            OptimizerKind::Sgd => Moments::Momentum(zeros()),
            OptimizerKind::AdamW | OptimizerKind::Lamb => Moments::Adam([zeros(), zeros()]),
            OptimizerKind::Adafactor => {
                let factorings = kind.factorings(params);
                Moments::Factored {
                    m: slices.iter().map(|slice| vec![bf16::ZERO; slice.len()]).collect(),
                    v: factorings.iter().map(|factoring| vec![0.0; factoring.len()]).collect(),
                    factorings,
                }
            }
        };
        Self {
            moments,
            step: 0,
            kind,
            params: params.len(),
            decay: slices.iter().map(|slice| weight_decay(&params[slice.param], config)).collect(),
            slices,
            beta1: config.beta1,
            beta2: config.beta2,
            beta2_power: config.beta2_power,
            nesterov: config.nesterov,
            eps: config.eps,
            clip: config.clip,
        }
    }

    /// Whether every element has a second moment of its own.
    pub fn keeps_second(&self) -> bool {
        self.kind.keeps_second()
    }

    /// First moments of slice `i`.
    pub fn first(&self, i: usize) -> Cow<'_, [f32]> {
        match &self.moments {
            Moments::Momentum(m) | Moments::Adam([m, _]) => m[i].as_slice().into(),
            Moments::Factored { m, .. } => m[i].iter().map(|m| m.to_f32()).collect(),
        }
    }

    /// Second moments of the elements of slice `i`; nothing where there are none.
    pub fn second(&self, i: usize) -> &[f32] {
        match &self.moments {
            Moments::Adam([_, v]) => &v[i],
            Moments::Momentum(_) | Moments::Factored { .. } => &[],
        }
    }

    /// What is kept of the second moments of each whole parameter ([`Factoring`]); nothing by others than Adafactor.
    pub fn statistics(&self) -> &[Vec<f32>] {
        match &self.moments {
            Moments::Factored { v, .. } => v,
            Moments::Momentum(_) | Moments::Adam(_) => &[],
        }
    }

    /// Replaces the moments: `second` and `statistics` where the optimiser keeps them.
    pub fn set_moments(&mut self, first: Vec<Vec<f32>>, second: Vec<Vec<f32>>, statistics: Vec<Vec<f32>>) {
        match &mut self.moments {
            Moments::Momentum(m) => *m = first,
            Moments::Adam(moments) => *moments = [first, second],
            Moments::Factored { m, v, .. } => {
                *m = first.into_iter().map(|m| m.into_iter().map(bf16::from_f32).collect()).collect();
                *v = statistics;
            }
        }
    }

    /// Weight decay of each slice.
    pub fn decay(&self) -> &[f64] {
        &self.decay
    }

    /// One step in place on `params` with learning rate `lr`. Returns the global gradient norm
    /// before clipping; a larger norm than `clip` (where that is not 0) scales the gradients down
    /// to it.
    ///
    /// # Errors
    /// [`NonFinite`] if the norm is not finite; nothing has changed then.
    ///
    /// # Panics
    /// If `params` or `grads` are not those the optimiser was made for.
    pub fn step(&mut self, lr: f64, params: &mut [Vec<f32>], grads: &[Vec<f32>]) -> Result<f64, NonFinite> {
        let norm = squares(grads).iter().sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Err(NonFinite { norm });
        }
        self.step_of_slices(lr, norm, params, grads, |_| Ok(()))?;
        Ok(norm)
    }

    /// The same on slices of the parameters, with the norm of all gradients, which is finite. What is summed over all
    /// of a parameter goes to `sum`, which adds the sums of the other ranks.
    ///
    /// # Errors
    /// That of `sum`; the moments may have changed then, the parameters have not.
    ///
    /// # Panics
    /// As [`step`](Self::step).
    pub fn step_of_slices<E>(
        &mut self,
        lr: f64,
        norm: f64,
        params: &mut [Vec<f32>],
        grads: &[Vec<f32>],
        sum: impl FnOnce(Sums<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let len = self.slices.len();
        assert!(params.len() == len && grads.len() == len, "one tensor a slice");
        self.step += 1;
        let (momentum, nesterov) = (self.beta1, self.nesterov);
        let keep = adafactor::second_decay(self.step, self.beta2_power, self.beta2);
        let grad_scale = if self.clip > 0.0 && norm > self.clip { self.clip / norm } else { 1.0 };
        let common = AdamW {
            lr,
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: 0.0,
            step: self.step,
            grad_scale,
        };
        let Self { slices, decay, moments, .. } = self;
        let tensors = params.par_iter_mut().zip(grads).zip(&*decay);
        match moments {
            Moments::Momentum(m) => tensors.zip(m).for_each(|(((p, grad), &weight_decay), m)| {
                sgd(&Sgd { lr, momentum, nesterov, weight_decay, grad_scale }, p, m, grad);
            }),
            Moments::Adam([m, v]) => {
                let tensors = tensors.zip(m.par_iter_mut().zip(v));
                if self.kind != OptimizerKind::Lamb {
                    tensors.for_each(|(((p, grad), &weight_decay), (m, v))| {
                        adamw(&AdamW { weight_decay, ..common }, p, m, v, grad);
                    });
                    return Ok(());
                }
                let updates = tensors.map(|(((p, grad), &weight_decay), (m, v))| {
                    let update = lamb_update(&AdamW { weight_decay, ..common }, p, m, v, grad);
                    ([sum_of_squares(p), sum_of_squares(&update)], update)
                });
                let (own, updates): (Vec<_>, Vec<_>) = updates.unzip();
                let mut squares = vec![0.0; 2 * self.params];
                for (slice, own) in slices.iter().zip(own).filter(|(slice, _)| slice.counted) {
                    squares[2 * slice.param..][..2].copy_from_slice(&own);
                }
                sum(Sums::Squares(&mut squares))?;
                let tensors = params.par_iter_mut().zip(&updates).zip(&*slices).zip(&*decay);
                tensors.for_each(|(((p, update), slice), &weight_decay)| {
                    let lamb = Lamb { adam: AdamW { weight_decay, ..common }, adapts: weight_decay != 0.0 };
                    lamb_apply(&lamb, [0, 1].map(|i| squares[2 * slice.param + i]), p, update);
                });
            }
            Moments::Factored { m, factorings, v } => {
                let mut sums = statistics(factorings, slices, grads, grad_scale);
                sum(Sums::Statistics(&mut sums))?;
                let mut rest = &sums[..];
                let of_param = factorings.iter().zip(v).map(|(factoring, v)| {
                    let (own, others) = rest.split_at(factoring.len());
                    rest = others;
                    (*factoring, own, v)
                });
                let of_param: Vec<_> = of_param.collect();
                let update = |(factoring, sums, v): (Factoring, &[f32], &mut Vec<f32>)| {
                    adafactor::update(factoring, keep, sums, v)
                };
                let factors: Vec<Vec<f32>> = of_param.into_par_iter().map(update).collect();
                tensors.zip(m).zip(&*slices).for_each(|((((p, grad), &weight_decay), m), slice)| {
                    let config = Adafactor { lr, momentum, weight_decay, grad_scale };
                    let (factoring, factors) = (factorings[slice.param], &factors[slice.param]);
                    for (run, at) in slice.places() {
                        let (p, m) = (&mut p[at.clone()], &mut m[at.clone()]);
                        adafactor::apply((&config, factoring), run, factors, p, m, &grad[at]);
                    }
                });
            }
        }
        Ok(())
    }
}

/// Sums of the squared gradients of these slices over rows and columns of the whole parameters.
fn statistics(
    factorings: &[Factoring],
    slices: &[OwnSlice],
    grads: &[Vec<f32>],
    grad_scale: f64,
) -> Vec<f32> {
    let mut of_param: Vec<Option<(&OwnSlice, &Vec<f32>)>> = vec![None; factorings.len()];
    for (slice, grad) in slices.iter().zip(grads).filter(|(slice, _)| slice.counted) {
        of_param[slice.param] = Some((slice, grad));
    }
    let sums = factorings.par_iter().zip(of_param).map(|(factoring, slice)| {
        let mut sums = vec![0.0; factoring.len()];
        if let Some((slice, grad)) = slice {
            for (run, at) in slice.places() {
                adafactor::add_squares(*factoring, run, &grad[at], grad_scale, &mut sums);
            }
        }
        sums.into_iter().map(|sum| sum as f32).collect::<Vec<f32>>()
    });
    sums.collect::<Vec<_>>().concat()
}

#[cfg(test)]
mod tests;
