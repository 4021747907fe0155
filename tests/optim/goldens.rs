//! SGD of the CPU device against `torch.optim.SGD`, Adafactor against optax (`tools/optim_goldens.py`).

use half::bf16;
use safetensors::SafeTensors;
use trencadis::cpu::optim::adafactor::{self, Adafactor, Factoring};
use trencadis::cpu::optim::{Sgd, sgd};

use crate::support::numbers::close;
use crate::support::places::root;

const NAMES: [&str; 4] = ["tall", "wide", "narrow", "vector"];
const STEPS: usize = 4;
/// Those of the generator.
const LR: f64 = 0.05;
const DECAY: f64 = 0.3;
const MOMENTUM: f64 = 0.9;
const CAP: f64 = 0.5;
const POWER: f64 = 0.8;

fn tensor(tensors: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = tensors.tensor(name).unwrap();
    let values = tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
    (tensor.shape().to_vec(), values.collect())
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

/// Calls `check` for every parameter: its shape, where it starts, its gradients, and what the reference gives.
fn each(check: impl Fn(&str, &[usize], &[f32], &[f32], &dyn Fn(&str) -> Vec<f64>)) {
    let bytes = std::fs::read(root().join("tests/optim/goldens.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for name in NAMES {
        let (shape, start) = tensor(&tensors, &format!("{name}.start"));
        let grads = tensor(&tensors, &format!("{name}.grads")).1;
        check(name, &shape, &start, &grads, &|key| wide(&tensor(&tensors, &format!("{name}.{key}")).1));
    }
}

#[test]
fn sgd_is_that_of_torch() {
    each(|_, _, start, grads, want| {
        for (rule, nesterov) in [("sgd", false), ("nesterov", true)] {
            let config = Sgd { lr: LR, momentum: MOMENTUM, nesterov, weight_decay: DECAY, grad_scale: 1.0 };
            let (mut p, mut m) = (start.to_vec(), vec![0.0; start.len()]);
            grads.chunks(start.len()).for_each(|grad| sgd(&config, &mut p, &mut m, grad));
            close(&p, &want(&format!("{rule}.p")), 5e-7);
            close(&m, &want(&format!("{rule}.m")), 1e-8);
        }
    });
}

#[test]
fn adafactor_is_that_of_optax() {
    each(|name, shape, start, grads, want| {
        let factoring = Factoring::of(shape);
        assert_eq!(factoring.factored().is_some(), matches!(name, "tall" | "wide"));
        // Gradients that are scaled, and scaled back.
        let config = Adafactor { lr: LR, momentum: MOMENTUM, weight_decay: DECAY, grad_scale: 0.25 };
        let (mut p, mut v) = (start.to_vec(), vec![0.0; factoring.len()]);
        let (mut m, all) = (vec![bf16::ZERO; p.len()], 0..p.len());
        for step in 1..=STEPS {
            let grad: Vec<f32> = grads[(step - 1) * p.len()..][..p.len()].iter().map(|g| 4.0 * g).collect();
            let mut sums = vec![0.0; factoring.len()];
            adafactor::add_squares(factoring, all.clone(), &grad, config.grad_scale, &mut sums);
            let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
            let keep = adafactor::second_decay(step as u64, POWER, CAP);
            let factors = adafactor::update(factoring, keep, &sums, &mut v);
            adafactor::apply((&config, factoring), all.clone(), &factors, &mut p, &mut m, &grad);
        }
        // A momentum may be rounded to the other side, from which the next step goes on.
        close(&p, &want("adafactor.p"), 5e-5);
        let relative = |got: &[f32], want: &[f64], tolerance: f64| {
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                let apart = (f64::from(*got) - want).abs();
                assert!(apart <= tolerance * want.abs(), "{name} {i}: {got:e} instead of {want:e}");
            }
        };
        relative(&v, &want("adafactor.v"), 1e-6);
        let m: Vec<f32> = m.iter().map(|m| m.to_f32()).collect();
        close(&m, &want("adafactor.m"), 2f64.powi(-8));
    });
}

#[test]
fn a_step_keeps_more_and_more_of_the_second_moments() {
    let keep = |step| adafactor::second_decay(step, 0.8, 0.999);
    assert_eq!((keep(1), keep(1 << 40)), (0.0, 0.999));
    assert!((keep(2) - (1.0 - 2f64.powf(-0.8))).abs() < 1e-15);
    assert!(keep(5623) < 0.999 && keep(5624) == 0.999);
}
