//! AdamW or LAMB over all parameters of a model: moments, weight-decay groups, clipping.

use rayon::prelude::*;

use crate::autograd::ParamSpec;
use crate::cpu::optim::{AdamW, Lamb, adamw, lamb_apply, lamb_update, sum_of_squares};
use crate::recipe::{OptimizerKind, TrainConfig};

/// Optimiser state and settings. All tensors are in the order of the parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    /// First moments.
    pub m: Vec<Vec<f32>>,
    /// Second moments.
    pub v: Vec<Vec<f32>>,
    /// Steps taken.
    pub step: u64,
    kind: OptimizerKind,
    decay: Vec<f64>,
    beta1: f64,
    beta2: f64,
    eps: f64,
    clip: f64,
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
        Self::sliced(params.iter().map(|param| (param, param.len())), config)
    }

    /// The same for some of the elements of each parameter.
    pub fn sliced<'a>(slices: impl Iterator<Item = (&'a ParamSpec, usize)>, config: &TrainConfig) -> Self {
        let (decay, m): (Vec<f64>, Vec<Vec<f32>>) =
            slices.map(|(param, len)| (weight_decay(param, config), vec![0.0; len])).unzip();
        Self {
            v: m.clone(),
            m,
            step: 0,
            kind: config.optimizer,
            decay,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            clip: config.clip,
        }
    }

    /// Weight decay of each parameter.
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

    /// The same on slices of the parameters, with the norm of all gradients, which is finite. LAMB hands the squares
    /// of each slice of a parameter and of its update to `whole`, which replaces them by those of the whole parameter.
    ///
    /// # Errors
    /// That of `whole`; the moments have changed then, the parameters have not.
    ///
    /// # Panics
    /// As [`step`](Self::step).
    pub fn step_of_slices<E>(
        &mut self,
        lr: f64,
        norm: f64,
        params: &mut [Vec<f32>],
        grads: &[Vec<f32>],
        whole: impl FnOnce(&mut [[f64; 2]]) -> Result<(), E>,
    ) -> Result<(), E> {
        assert!(params.len() == self.m.len() && grads.len() == self.m.len(), "one tensor a parameter");
        self.step += 1;
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
        let moments = self.m.par_iter_mut().zip(&mut self.v);
        let tensors = params.par_iter_mut().zip(moments).zip(grads).zip(&self.decay);
        match self.kind {
            OptimizerKind::AdamW => tensors.for_each(|(((p, (m, v)), grad), &weight_decay)| {
                adamw(&AdamW { weight_decay, ..common }, p, m, v, grad);
            }),
            OptimizerKind::Lamb => {
                let updates = tensors.map(|(((p, (m, v)), grad), &weight_decay)| {
                    let update = lamb_update(&AdamW { weight_decay, ..common }, p, m, v, grad);
                    ([sum_of_squares(p), sum_of_squares(&update)], update)
                });
                let (mut squares, updates): (Vec<_>, Vec<_>) = updates.unzip();
                whole(&mut squares)?;
                let tensors = params.par_iter_mut().zip(&updates).zip(squares).zip(&self.decay);
                tensors.for_each(|(((p, update), squares), &weight_decay)| {
                    let adam = AdamW { weight_decay, ..common };
                    lamb_apply(&Lamb { adam, adapts: weight_decay != 0.0 }, squares, p, update);
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::graph::Init;

    fn spec(name: &str, len: usize, decay: bool, head: bool) -> ParamSpec {
        ParamSpec { name: name.into(), shape: vec![len], init: Init::Constant(0.0), decay, head }
    }

    fn params() -> [ParamSpec; 4] {
        [
            spec("w", 3, true, false),
            spec("gain", 2, false, false),
            spec("head.weight", 2, true, true),
            spec("head.bias", 1, false, true),
        ]
    }

    /// The first step of AdamW is `lr · g / |g|` plus decay.
    fn config() -> TrainConfig {
        TrainConfig { weight_decay: 0.1, clip: 0.0, ..TrainConfig::default() }
    }

    #[test]
    fn decay_groups() {
        assert_eq!(Optimizer::new(&params(), &config()).decay(), [0.1, 0.0, 0.1, 0.0]);
        let own = TrainConfig { head_weight_decay: 3.0, ..config() };
        assert_eq!(Optimizer::new(&params(), &own).decay(), [0.1, 0.0, 3.0, 0.0]);
        let none = TrainConfig { head_weight_decay: 0.0, ..config() };
        assert_eq!(Optimizer::new(&params(), &none).decay(), [0.1, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_step_moves_by_the_sign_and_decays() {
        let mut optimizer = Optimizer::new(&params(), &config());
        let mut p = vec![vec![1.0; 3], vec![1.0; 2], vec![1.0; 2], vec![1.0]];
        let grads = vec![vec![2.0, -2.0, 1.0], vec![4.0, -4.0], vec![2.0, 2.0], vec![0.5]];
        let norm = optimizer.step(0.01, &mut p, &grads).unwrap();
        assert!((norm - (4.0 + 4.0 + 1.0 + 32.0 + 8.0 + 0.25f64).sqrt()).abs() < 1e-6, "{norm}");
        let expected = [vec![0.989, 1.009, 0.989], vec![0.99, 1.01], vec![0.989, 0.989], vec![0.99f32]];
        for (got, want) in p.iter().flatten().zip(expected.iter().flatten()) {
            assert!((got - want).abs() < 1e-6, "{p:?}");
        }
        assert_eq!(optimizer.step, 1);
    }

    #[test]
    fn clipping_scales_every_gradient_alike() {
        let clipped = TrainConfig { clip: 0.5, ..config() };
        let mut optimizer = Optimizer::new(&params(), &clipped);
        let mut p = vec![vec![0.0; 3], vec![0.0; 2], vec![0.0; 2], vec![0.0]];
        let grads = vec![vec![3.0, 0.0, 0.0], vec![0.0, 4.0], vec![0.0; 2], vec![0.0]];
        // The first step does not show the scale, the moments do.
        assert!((optimizer.step(0.01, &mut p, &grads).unwrap() - 5.0).abs() < 1e-9);
        assert!((optimizer.m[0][0] - 0.1 * 0.3).abs() < 1e-7 && (optimizer.m[1][1] - 0.1 * 0.4).abs() < 1e-7);
        // A norm below the bound is left alone.
        let mut other = Optimizer::new(&params(), &TrainConfig { clip: 10.0, ..config() });
        other.step(0.01, &mut p, &grads).unwrap();
        assert!((other.m[0][0] - 0.3).abs() < 1e-6);
    }

    /// Whole parameters, and the halves of each with what they tell each other: those that decay move by `lr` times
    /// their norm, and by AdamW's step the others.
    #[test]
    fn lamb_takes_the_norms_of_whole_parameters() {
        let lamb = TrainConfig { optimizer: OptimizerKind::Lamb, ..config() };
        let start = vec![vec![3.0, 0.0, 4.0], vec![1.0; 2], vec![0.6, 0.8], vec![1.0f32]];
        let grads = vec![vec![2.0, -2.0, 1.0], vec![4.0, -4.0], vec![2.0, 2.0], vec![0.5f32]];
        let (mut optimizer, mut whole) = (Optimizer::new(&params(), &lamb), start.clone());
        let norm = optimizer.step(0.01, &mut whole, &grads).unwrap();
        let moved = |p: usize| -> f64 {
            let change = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
            whole[p].iter().zip(&start[p]).map(change).sum::<f64>().sqrt()
        };
        for (p, want) in [0.05, 0.01 * 2f64.sqrt(), 0.01, 0.01].into_iter().enumerate() {
            assert!((moved(p) - want).abs() < 1e-6, "{p}: {}", moved(p));
        }

        let cut = |values: &[Vec<f32>], half: usize| -> Vec<Vec<f32>> {
            let part = |x: &Vec<f32>| [&x[..x.len() / 2], &x[x.len() / 2..]][half].to_vec();
            values.iter().map(part).collect()
        };
        let specs = params();
        let halves = [0, 1].map(|half| {
            let own = cut(&start, half);
            let slices = specs.iter().zip(&own).map(|(spec, own)| (spec, own.len()));
            (Optimizer::sliced(slices, &lamb), own, cut(&grads, half))
        });
        let mut told = Vec::new();
        for (mut optimizer, mut own, grads) in halves.clone() {
            let tell = |squares: &mut [[f64; 2]]| Err(squares.to_vec());
            told.push(optimizer.step_of_slices(0.01, norm, &mut own, &grads, tell).unwrap_err());
        }
        for (half, (mut optimizer, mut own, grads)) in halves.into_iter().enumerate() {
            let sum = |squares: &mut [[f64; 2]]| {
                let sums = told[0].iter().zip(&told[1]).map(|(a, b)| [a[0] + b[0], a[1] + b[1]]);
                squares.iter_mut().zip(sums).for_each(|(squares, sum)| *squares = sum);
                Ok::<_, NonFinite>(())
            };
            optimizer.step_of_slices(0.01, norm, &mut own, &grads, sum).unwrap();
            for (got, want) in own.iter().flatten().zip(cut(&whole, half).iter().flatten()) {
                assert!((got - want).abs() < 1e-6, "{own:?} and {whole:?}");
            }
        }
    }

    #[test]
    fn a_norm_that_is_not_finite_changes_nothing() {
        for (bad, kind) in [(f32::NAN, OptimizerKind::AdamW), (f32::INFINITY, OptimizerKind::Lamb)] {
            let mut optimizer = Optimizer::new(&params(), &TrainConfig { optimizer: kind, ..config() });
            let mut p = vec![vec![1.0; 3], vec![1.0; 2], vec![1.0; 2], vec![1.0]];
            let before = (optimizer.clone(), p.clone());
            let grads = vec![vec![1.0; 3], vec![1.0; 2], vec![1.0, bad], vec![1.0]];
            let error = optimizer.step(0.01, &mut p, &grads).unwrap_err();
            assert!(!error.norm.is_finite());
            assert_eq!((optimizer, p), before);
        }
    }
}
