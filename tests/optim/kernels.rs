//! The optimiser's kernels against the CPU device: same operations in the same order, so nearly the same bits.

use half::bf16;

use trencadis::cpu::optim::{self as oracle, AdamW, Lamb, Sgd};
use trencadis::device::{Buffer, Device};
use trencadis::kernels::optim::{
    Arena, Moments, Operands, OptimizerState, OptimizerStep, Tables, TensorSpec, cast, workspace_bytes, zero,
};
use trencadis::kernels::tolerance as to;
use trencadis::rng::{Purpose, philox};

use crate::support::devices::devices;
use crate::support::numbers::random;

const LENGTHS: [usize; 7] = [1, 2048, 7, 5000, 0, 64, 2049];
pub const STEP: OptimizerStep = OptimizerStep {
    lr: 3e-3,
    beta1: 0.9,
    beta2: 0.99,
    beta2_power: 0.8,
    eps: 1e-8,
    clip: 1.0,
    ema_decay: 0.75,
    images: 0.0,
    seed: 0x1234_5678_9abc,
    continues: 0,
    unfinished: 0,
};

fn specs() -> Vec<TensorSpec> {
    let spec = |(i, &len): (usize, &usize)| TensorSpec {
        len,
        weight_decay: [0.05, 0.0, 0.3][i % 3],
        adapts: i % 3 != 1,
    };
    LENGTHS.iter().enumerate().map(spec).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    AdamW,
    Lamb,
    Sgd { nesterov: bool },
}

pub const RULES: [Rule; 4] =
    [Rule::AdamW, Rule::Lamb, Rule::Sgd { nesterov: false }, Rule::Sgd { nesterov: true }];

/// What lies in the arenas; tensors of it are those of the CPU device.
#[derive(Clone, Debug, PartialEq)]
struct Values {
    params: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    average: Vec<f32>,
    weights: Vec<bf16>,
}

pub struct OnDevice {
    pub arena: Arena,
    pub tables: Tables,
    pub params: Buffer<f32>,
    pub grads: Buffer<f32>,
    m: Buffer<f32>,
    v: Buffer<f32>,
    weights: Buffer<bf16>,
    average: Buffer<f32>,
    pub step: Buffer<OptimizerStep>,
    pub state: Buffer<OptimizerState>,
    pub workspace: Buffer<u8>,
}

/// The tensors' values, zeros between them.
pub fn scatter(arena: &Arena, seed: u64, scale: f32) -> Vec<f32> {
    let mut all = vec![0f32; arena.len()];
    for (i, range) in arena.ranges().iter().enumerate() {
        let values: Vec<f32> = random(range.len(), seed + i as u64);
        all[range.clone()].iter_mut().zip(values).for_each(|(x, value)| *x = scale * value);
    }
    all
}

impl OnDevice {
    pub fn new(device: &Device, step: OptimizerStep) -> Self {
        let arena = Arena::new(&specs()).unwrap();
        let params = scatter(&arena, 1, 1.0);
        Self {
            tables: arena.upload(device).unwrap(),
            params: device.upload(&params).unwrap(),
            average: device.upload(&params).unwrap(),
            grads: device.zeros(arena.len()).unwrap(),
            m: device.zeros(arena.len()).unwrap(),
            v: device.zeros(arena.len()).unwrap(),
            weights: device.zeros(arena.len()).unwrap(),
            step: device.upload(&[step]).unwrap(),
            state: device.zeros(1).unwrap(),
            workspace: device.alloc(workspace_bytes(&arena, device)).unwrap(),
            arena,
        }
    }

    fn run(
        &self,
        device: &Device,
        rule: Rule,
        stochastic: bool,
        full: bool,
        grads: &[f32],
    ) -> OptimizerState {
        let stream = device.stream().unwrap();
        self.grads.write(&stream, grads).unwrap();
        let operands = Operands {
            arena: &self.arena,
            tables: &self.tables,
            params: &self.params,
            grads: &self.grads,
            moments: self.moments(rule),
            weights: full.then_some(&self.weights),
            average: full.then_some(&self.average),
            step: &self.step,
            state: &self.state,
            squared: None,
            stochastic,
            workspace: &self.workspace,
        };
        match rule {
            Rule::AdamW => operands.adamw(&stream).unwrap(),
            Rule::Lamb => operands.lamb(&stream).unwrap(),
            Rule::Sgd { .. } => operands.sgd(&stream).unwrap(),
        }
        stream.synchronize().unwrap();
        self.state.download().unwrap()[0]
    }

    pub fn moments(&self, rule: Rule) -> Moments<'_> {
        match rule {
            Rule::AdamW | Rule::Lamb => Moments::Adam { m: &self.m, v: &self.v },
            Rule::Sgd { nesterov } => Moments::Momentum { m: &self.m, nesterov },
        }
    }

    fn values(&self) -> Values {
        Values {
            params: self.params.download().unwrap(),
            m: self.m.download().unwrap(),
            v: self.v.download().unwrap(),
            average: self.average.download().unwrap(),
            weights: self.weights.download().unwrap(),
        }
    }
}

/// One step of the CPU device, tensor by tensor.
fn expected(values: &mut Values, arena: &Arena, rule: Rule, t: u64, grads: &[f32]) -> f64 {
    let norm = oracle::sum_of_squares(grads).sqrt();
    let grad_scale = if STEP.clip > 0.0 && norm > STEP.clip { STEP.clip / norm } else { 1.0 };
    for (range, spec) in arena.ranges().iter().zip(specs()) {
        let range = range.clone();
        let adam = AdamW {
            lr: STEP.lr,
            beta1: STEP.beta1,
            beta2: STEP.beta2,
            eps: STEP.eps,
            weight_decay: spec.weight_decay,
            step: t,
            grad_scale,
        };
        let Values { params, m, v, average, .. } = values;
        let (p, m, v) = (&mut params[range.clone()], &mut m[range.clone()], &mut v[range.clone()]);
        match rule {
            Rule::AdamW => oracle::adamw(&adam, p, m, v, &grads[range.clone()]),
            Rule::Lamb => oracle::lamb(&Lamb { adam, adapts: spec.adapts }, p, m, v, &grads[range.clone()]),
            Rule::Sgd { nesterov } => {
                let OptimizerStep { lr, beta1: momentum, .. } = STEP;
                let sgd = Sgd { lr, momentum, nesterov, weight_decay: spec.weight_decay, grad_scale };
                oracle::sgd(&sgd, p, m, &grads[range.clone()]);
            }
        }
        oracle::moving_average(&mut average[range.clone()], &params[range], STEP.ema_decay);
    }
    values.weights = values.params.iter().copied().map(bf16::from_f32).collect();
    norm
}

#[track_caller]
fn alike(name: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * want.abs().max(1e-6),
            "{name}[{i}]: {got} instead of {want}"
        );
    }
}

/// Factors may differ in their last bit, by the way in which powers are taken.
#[test]
fn steps_of_all_rules() {
    for device in devices() {
        for rule in RULES {
            let on_device = OnDevice::new(&device, STEP);
            let arena = &on_device.arena;
            let mut values = on_device.values();
            for t in 1..=3u64 {
                // The first gradients are clipped, the others are not.
                let grads = scatter(arena, 100 * t, if t == 1 { 1.0 } else { 1e-3 });
                let state = on_device.run(&device, rule, false, true, &grads);
                let norm = expected(&mut values, arena, rule, t, &grads);
                assert!((state.norm - norm).abs() <= 1e-12 * norm, "{} {norm}", state.norm);
                assert_eq!((state.step, state.skipped, state.factors.skip), (t, 0, 0));
                assert_eq!(state.factors.grad_scale < 1.0, t == 1);
                let got = on_device.values();
                alike("params", &got.params, &values.params, to::OPTIMISER as f32);
                alike("m", &got.m, &values.m, to::OPTIMISER as f32);
                alike("v", &got.v, &values.v, to::OPTIMISER as f32);
                alike("average", &got.average, &values.average, to::OPTIMISER as f32);
                for (x, p) in got.weights.iter().zip(&got.params) {
                    assert_eq!(x.to_bits(), bf16::from_f32(*p).to_bits());
                }
                let mut owned = vec![false; arena.len()];
                arena.ranges().iter().for_each(|range| owned[range.clone()].fill(true));
                let between = |x: &[f32]| x.iter().zip(&owned).all(|(x, owned)| *owned || x.to_bits() == 0);
                assert!([&got.params, &got.m, &got.v, &got.average].into_iter().all(|x| between(x)));
                values = got;
            }
        }
    }
}

/// Neither copies nor average: the same parameters, and the others stay as they are.
#[test]
fn copies_are_optional_and_steps_repeat() {
    for device in devices() {
        for rule in RULES {
            let (one, other) = (OnDevice::new(&device, STEP), OnDevice::new(&device, STEP));
            let grads = scatter(&one.arena, 50, 1.0);
            let before = other.values();
            let states =
                (one.run(&device, rule, true, true, &grads), other.run(&device, rule, true, false, &grads));
            assert_eq!(states.0, states.1);
            let (one, other) = (one.values(), other.values());
            assert_eq!((&one.params, &one.m, &one.v), (&other.params, &other.m, &other.v));
            assert_eq!((other.average, other.weights), (before.average, before.weights));
        }
    }
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    for device in devices() {
        for rule in RULES {
            let on_device = OnDevice::new(&device, STEP);
            let good = scatter(&on_device.arena, 50, 1.0);
            on_device.run(&device, rule, false, true, &good);
            let before = on_device.values();
            for (i, bad) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
                let mut grads = good.clone();
                grads[on_device.arena.ranges()[3].start + 4567] = bad;
                let state = on_device.run(&device, rule, false, true, &grads);
                assert!(!state.norm.is_finite());
                assert_eq!((state.step, state.skipped), (1, i as u64 + 1));
                assert_ne!(state.factors.skip, 0);
                assert_eq!(on_device.values(), before);
            }
            // Large, but finite: squares are in f64.
            let mut grads = good.clone();
            grads[0] = 1e30;
            let state = on_device.run(&device, rule, false, true, &grads);
            assert!((state.norm / 1e30 - 1.0).abs() < 1e-6);
            assert_eq!((state.step, state.factors.skip), (2, 0));
        }
    }
}

/// A step of several batches: only its first makes zeros of the gradients, only its last updates.
#[test]
fn batches_of_a_step() {
    for device in devices() {
        for rule in RULES {
            let on_device = OnDevice::new(&device, OptimizerStep { unfinished: 1, ..STEP });
            let grads = scatter(&on_device.arena, 50, 1.0);
            let before = on_device.values();
            let state = on_device.run(&device, rule, false, true, &grads);
            assert_eq!((state.step, state.skipped, state.norm), (0, 0, 0.0));
            assert_eq!(on_device.values(), before);
            assert_eq!(on_device.grads.download().unwrap(), grads);

            let stream = device.stream().unwrap();
            let continues = OptimizerStep { continues: 1, ..STEP };
            on_device.step.write(&stream, &[continues]).unwrap();
            zero(&stream, &on_device.grads, Some(&on_device.step)).unwrap();
            assert_eq!(on_device.grads.download().unwrap(), grads);
            let state = on_device.run(&device, rule, false, true, &grads);
            assert_eq!((state.step, state.factors.skip), (1, 0));
            assert!(on_device.values().params != before.params);

            // Gradients that are the sum over 8 images are those of one; 8 divides without rounding.
            let summed = OnDevice::new(&device, OptimizerStep { images: 8.0, ..STEP });
            let eightfold: Vec<f32> = grads.iter().map(|g| 8.0 * g).collect();
            let divided = summed.run(&device, rule, false, true, &eightfold);
            assert_eq!((divided.norm, divided.lr), (state.norm, state.lr));
            assert_eq!((summed.values().params, summed.values().v), {
                let values = on_device.values();
                (values.params, values.v)
            });

            on_device.step.write(&stream, &[STEP]).unwrap();
            zero(&stream, &on_device.grads, Some(&on_device.step)).unwrap();
            assert!(on_device.grads.download().unwrap().iter().all(|x| x.to_bits() == 0));
        }
    }
}

/// Random rounding is that of the host's Philox, right in the mean, and the cast repeats it.
#[test]
fn stochastic_rounding_follows_seed_step_and_place() {
    for device in devices() {
        let on_device = OnDevice::new(&device, STEP);
        let grads = scatter(&on_device.arena, 50, 1.0);
        on_device.run(&device, Rule::AdamW, true, true, &grads);
        let state = on_device.run(&device, Rule::AdamW, true, true, &grads);
        let got = on_device.values();
        let key = [STEP.seed as u32, (STEP.seed >> 32) as u32];
        let (mut up, mut share) = (0.0, 0.0);
        for (i, (&x, weight)) in got.params.iter().zip(&got.weights).enumerate() {
            let counter =
                [i as u32 / 8, Purpose::Rounding as u32, state.step as u32, (state.step >> 32) as u32];
            let word = philox(counter, key)[i % 8 / 2];
            let random = if i % 2 == 0 { word & 0xffff } else { word >> 16 };
            assert_eq!(weight.to_bits(), ((x.to_bits() + random) >> 16) as u16, "element {i}");
            up += f64::from(u8::from(u32::from(weight.to_bits()) != x.to_bits() >> 16));
            share += f64::from(x.to_bits() & 0xffff) / 65_536.0;
        }
        assert!((up - share).abs() < 4.0 * (got.params.len() as f64 / 4.0).sqrt(), "{up} {share}");

        let stream = device.stream().unwrap();
        let copy = device.alloc::<bf16>(got.params.len()).unwrap();
        cast(&stream, &copy, &on_device.params, Some((&on_device.step, &on_device.state))).unwrap();
        assert_eq!(copy.download().unwrap(), got.weights);
        cast(&stream, &copy, &on_device.params, None).unwrap();
        let nearest: Vec<bf16> = got.params.iter().copied().map(bf16::from_f32).collect();
        assert_eq!(copy.download().unwrap(), nearest);

        // What is not finite stays so.
        let odd =
            [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, 1.0, -2.0, 0.0, f32::from_bits(u32::MAX)];
        let (x, copy) = (device.upload(&odd).unwrap(), device.alloc::<bf16>(8).unwrap());
        cast(&stream, &copy, &x, Some((&on_device.step, &on_device.state))).unwrap();
        let copy = copy.download().unwrap();
        assert_eq!((copy[0], copy[1]), (bf16::INFINITY, bf16::NEG_INFINITY));
        assert!(copy[2].is_nan() && copy[7].is_nan());
        assert_eq!(copy[4..7], [1.0, -2.0, 0.0].map(bf16::from_f32));
    }
}

#[test]
fn zeros_and_sizes() {
    for device in devices() {
        let stream = device.stream().unwrap();
        for len in [8, 8192, 8200, 20_000] {
            let x = device.upload(&vec![f32::NAN; len]).unwrap();
            zero(&stream, &x, None).unwrap();
            assert!(x.download().unwrap().iter().all(|x| x.to_bits() == 0));
        }
        let says = |len| zero(&stream, &device.alloc::<f32>(len).unwrap(), None).unwrap_err().to_string();
        assert!(says(12).contains("multiple of 8") && says(0).contains("at least 8"));
        let (x, short) = (device.alloc::<f32>(16).unwrap(), device.alloc::<bf16>(8).unwrap());
        assert!(cast(&stream, &short, &x, None).unwrap_err().to_string().contains("expected 16"));

        let on_device = OnDevice::new(&device, STEP);
        let operands = Operands {
            arena: &on_device.arena,
            tables: &on_device.tables,
            params: &on_device.params,
            grads: &x,
            moments: on_device.moments(Rule::AdamW),
            weights: None,
            average: None,
            step: &on_device.step,
            state: &on_device.state,
            squared: None,
            stochastic: false,
            workspace: &on_device.workspace,
        };
        assert!(operands.adamw(&stream).unwrap_err().to_string().contains("grads has 16 elements"));
        let small = device.alloc::<u8>(8).unwrap();
        let lamb = Operands { grads: &on_device.grads, workspace: &small, ..operands }.lamb(&stream);
        assert!(lamb.unwrap_err().to_string().contains("the workspace has 8 bytes"));
        let sgd = Operands { grads: &on_device.grads, ..operands }.sgd(&stream).unwrap_err();
        assert_eq!(sgd.to_string(), "SGD was given the moments of AdamW and LAMB; give its own");
    }
}
