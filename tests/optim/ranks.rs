//! Steps of ranks that have slices of the parameters each: whatever crosses them is carried by the test.

use trencadis::cpu::optim::{self as oracle, AdamW, Lamb, Sgd};
use trencadis::device::{Buffer, Device};
use trencadis::kernels::optim::{
    Arena, Moments, Operands, OptimizerState, OptimizerStep, SliceSpec, Tables, TensorSpec, add,
    workspace_bytes,
};
use trencadis::parallel::collectives::part_of;

use crate::support::devices::devices;
use crate::support::numbers::random;

const RANKS: usize = 3;
/// Elements and weight decay of each tensor. The last rank has nothing of the second.
const TENSORS: [(usize, f64); 6] = [(7000, 0.05), (2, 0.3), (64, 0.0), (1000, 0.3), (300, 0.1), (40, 0.0)];
/// Those from here on are whole on every rank.
const SHARED: usize = 4;
/// Partial sums of a rank.
const BLOCKS: usize = 2;
const STEP: OptimizerStep = OptimizerStep {
    lr: 3e-3,
    beta1: 0.9,
    beta2: 0.99,
    beta2_power: 0.8,
    eps: 1e-8,
    clip: 1.0,
    ema_decay: 0.0,
    images: 0.0,
    seed: 0,
    continues: 0,
    unfinished: 0,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    AdamW,
    Lamb,
    Sgd,
}

/// One tensor each.
type Values = Vec<Vec<f32>>;

fn values(seed: u64, scale: f32) -> Values {
    let tensor = |(i, &(len, _)): (usize, &(usize, f64))| -> Vec<f32> {
        random::<f32>(len, seed + i as u64).into_iter().map(|x| scale * x).collect()
    };
    TENSORS.iter().enumerate().map(tensor).collect()
}

struct Rank {
    rank: usize,
    arena: Arena,
    tables: Tables,
    params: Buffer<f32>,
    grads: Buffer<f32>,
    m: Buffer<f32>,
    v: Buffer<f32>,
    step: Buffer<OptimizerStep>,
    state: Buffer<OptimizerState>,
    workspace: Buffer<u8>,
    /// Sums of this rank: of gradients, and of parameters and updates.
    own: [Buffer<f64>; 2],
    /// And of all.
    all: [Buffer<f64>; 2],
}

impl Rank {
    fn new(device: &Device, rank: usize, params: &Values) -> Self {
        let mut slices = Vec::new();
        for (whole, &(len, weight_decay)) in TENSORS.iter().enumerate() {
            let len = if whole < SHARED { part_of(len, RANKS, rank).len() } else { len };
            let spec = TensorSpec { len, weight_decay, adapts: weight_decay != 0.0 };
            if len > 0 {
                slices.push(SliceSpec { spec, whole: Some(whole) });
            }
            if whole == 0 {
                let spec = TensorSpec { len: 64, weight_decay: 0.0, adapts: false };
                slices.push(SliceSpec { spec, whole: None });
            }
        }
        let arena = Arena::of_slices(&slices, TENSORS.len()).unwrap();
        let (sums, zeros) = ([BLOCKS, 2 * TENSORS.len()], |len| device.zeros::<f32>(len).unwrap());
        let rank = Self {
            rank,
            tables: arena.upload(device).unwrap(),
            params: zeros(arena.len()),
            grads: zeros(arena.len()),
            m: zeros(arena.len()),
            v: zeros(arena.len()),
            step: device.upload(&[STEP]).unwrap(),
            state: device.zeros(1).unwrap(),
            workspace: device.alloc(workspace_bytes(&arena, device)).unwrap(),
            own: sums.map(|len| device.zeros(len).unwrap()),
            all: sums.map(|len| device.zeros(RANKS * len).unwrap()),
            arena,
        };
        rank.params.write(&device.stream().unwrap(), &rank.cut(params)).unwrap();
        rank
    }

    /// The slices with their tensors and the elements of these.
    fn slices(&self) -> impl Iterator<Item = (std::ops::Range<usize>, usize, std::ops::Range<usize>)> {
        let slices = self.arena.ranges().iter().zip(self.arena.tensors());
        slices.filter(|(_, entry)| entry.whole >= 0).map(|(range, entry)| {
            let whole = entry.whole as usize;
            let len = TENSORS[whole].0;
            let part = if whole < SHARED { part_of(len, RANKS, self.rank) } else { 0..len };
            (range.clone(), whole, part)
        })
    }

    fn cut(&self, values: &Values) -> Vec<f32> {
        let mut arena = vec![0.0; self.arena.len()];
        self.slices().for_each(|(at, whole, part)| arena[at].copy_from_slice(&values[whole][part]));
        arena
    }

    /// Elements that this rank counts: what all have, the first one.
    fn counted(&self) -> usize {
        let shared = || self.slices().find(|(_, whole, _)| *whole == SHARED).unwrap().0.start;
        if self.rank == 0 { self.arena.len() } else { shared() }
    }

    fn operands(&self, rule: Rule) -> Operands<'_> {
        Operands {
            arena: &self.arena,
            tables: &self.tables,
            params: &self.params,
            grads: &self.grads,
            moments: match rule {
                Rule::AdamW | Rule::Lamb => Moments::Adam { m: &self.m, v: &self.v },
                Rule::Sgd => Moments::Momentum { m: &self.m, nesterov: false },
            },
            weights: None,
            average: None,
            step: &self.step,
            state: &self.state,
            squared: None,
            stochastic: false,
            workspace: &self.workspace,
        }
    }

    /// Parameters, moments, state.
    fn download(&self) -> ([Vec<f32>; 3], OptimizerState) {
        let of = |buffer: &Buffer<f32>| buffer.download().unwrap();
        ([of(&self.params), of(&self.m), of(&self.v)], self.state.download().unwrap()[0])
    }
}

fn ranks(device: &Device, params: &Values) -> Vec<Rank> {
    (0..RANKS).map(|rank| Rank::new(device, rank, params)).collect()
}

/// Every rank's sums, on all.
fn gather(device: &Device, ranks: &[Rank], which: usize) {
    let stream = device.stream().unwrap();
    let all: Vec<f64> = ranks.iter().flat_map(|rank| rank.own[which].download().unwrap()).collect();
    ranks.iter().for_each(|rank| rank.all[which].write(&stream, &all).unwrap());
    stream.synchronize().unwrap();
}

fn step(device: &Device, ranks: &[Rank], rule: Rule, grads: &Values) {
    let stream = device.stream().unwrap();
    for rank in ranks {
        rank.grads.write(&stream, &rank.cut(grads)).unwrap();
        rank.operands(rule).squares(&stream, 0..rank.counted(), &rank.own[0]).unwrap();
    }
    stream.synchronize().unwrap();
    gather(device, ranks, 0);
    if rule != Rule::Lamb {
        ranks.iter().for_each(|rank| {
            let (operands, squares) = (rank.operands(rule), &rank.all[0]);
            match rule {
                Rule::Sgd => operands.sgd_of(&stream, squares).unwrap(),
                _ => operands.adamw_of(&stream, squares).unwrap(),
            }
        });
        return stream.synchronize().unwrap();
    }
    for rank in ranks {
        let Rank { all, own, .. } = rank;
        rank.operands(rule).lamb_squares(&stream, &all[0], rank.counted(), &own[1]).unwrap();
    }
    stream.synchronize().unwrap();
    gather(device, ranks, 1);
    ranks.iter().for_each(|rank| rank.operands(rule).lamb_of(&stream, &rank.all[1]).unwrap());
    stream.synchronize().unwrap();
}

/// Every rank's parameters and moments are its slices of those of whole tensors on the CPU device.
#[test]
fn slices_step_as_whole_tensors_do() {
    for device in devices() {
        for rule in [Rule::AdamW, Rule::Lamb, Rule::Sgd] {
            let mut p = values(1, 1.0);
            let ranks = ranks(&device, &p);
            let zeros: Values = p.iter().map(|p| vec![0.0; p.len()]).collect();
            let (mut m, mut v) = (zeros.clone(), zeros);
            for t in 1..=2u64 {
                // The first gradients are clipped, the others are not.
                let grads = values(100 * t, if t == 1 { 1.0 } else { 1e-3 });
                let before = p.clone();
                step(&device, &ranks, rule, &grads);
                let norm = grads.iter().map(|grad| oracle::sum_of_squares(grad)).sum::<f64>().sqrt();
                let grad_scale = if norm > STEP.clip { STEP.clip / norm } else { 1.0 };
                for (i, (_, weight_decay)) in TENSORS.into_iter().enumerate() {
                    let OptimizerStep { lr, beta1, beta2, eps, .. } = STEP;
                    let adam = AdamW { lr, beta1, beta2, eps, weight_decay, step: t, grad_scale };
                    let (p, m, v) = (&mut p[i], &mut m[i], &mut v[i]);
                    match rule {
                        Rule::AdamW => oracle::adamw(&adam, p, m, v, &grads[i]),
                        Rule::Sgd => {
                            let sgd = Sgd { lr, momentum: beta1, nesterov: false, weight_decay, grad_scale };
                            oracle::sgd(&sgd, p, m, &grads[i]);
                        }
                        Rule::Lamb => {
                            oracle::lamb(&Lamb { adam, adapts: weight_decay != 0.0 }, p, m, v, &grads[i]);
                        }
                    }
                }
                if rule == Rule::Lamb {
                    let all = ranks[0].all[1].download().unwrap();
                    for (i, p) in before.iter().enumerate() {
                        let sum: f64 = all.chunks(2).skip(i).step_by(TENSORS.len()).map(|sums| sums[0]).sum();
                        let want = oracle::sum_of_squares(p);
                        assert!((sum - want).abs() <= 1e-12 * want, "tensor {i} counts once: {sum}, {want}");
                    }
                }
                for rank in &ranks {
                    let (got, state) = rank.download();
                    assert!((state.norm - norm).abs() <= 1e-12 * norm, "{} and {norm}", state.norm);
                    assert_eq!((state.step, state.factors.skip), (t, 0));
                    for (got, want) in got.iter().zip([&p, &m, &v]) {
                        for (i, (got, want)) in got.iter().zip(rank.cut(want)).enumerate() {
                            // Factors may differ in their last bit, by the way in which powers are taken.
                            let close = (got - want).abs() <= 1e-6 * want.abs().max(1e-6);
                            assert!(close, "{rule:?}, rank {}, {i}: {got} and {want}", rank.rank);
                        }
                    }
                }
                let shared = |rank: &Rank| -> Vec<f32> {
                    let (of, params) = (rank.slices().filter(|slice| slice.1 >= SHARED), rank.download().0);
                    of.flat_map(|(at, ..)| params[0][at].to_vec()).collect()
                };
                assert!(
                    ranks.iter().all(|rank| shared(rank) == shared(&ranks[0])),
                    "the same bits everywhere"
                );
            }
        }
    }
}

/// A gradient that is not finite on one rank, and a step with another batch to come, change nothing on any.
#[test]
fn what_no_step_follows_from_changes_nothing() {
    for device in devices() {
        for rule in [Rule::AdamW, Rule::Lamb, Rule::Sgd] {
            let ranks = ranks(&device, &values(1, 1.0));
            let before: Vec<_> = ranks.iter().map(|rank| rank.download().0).collect();
            let unchanged = || ranks.iter().zip(&before).all(|(rank, before)| rank.download().0 == *before);
            let mut grads = values(100, 1.0);
            grads[0][6999] = f32::NAN;
            step(&device, &ranks, rule, &grads);
            for rank in &ranks {
                let state = rank.download().1;
                assert_eq!((state.step, state.skipped), (0, 1));
                assert!(state.norm.is_nan() && state.factors.skip != 0);
            }
            assert!(unchanged());

            let unfinished = OptimizerStep { unfinished: 1, ..STEP };
            let stream = device.stream().unwrap();
            for rank in &ranks {
                rank.step.write(&stream, &[unfinished]).unwrap();
                rank.own[0].write(&stream, &[-1.0; BLOCKS]).unwrap();
            }
            stream.synchronize().unwrap();
            step(&device, &ranks, rule, &values(100, 1.0));
            for rank in &ranks {
                let state = rank.download().1;
                assert_eq!((state.step, state.skipped), (0, 1));
                assert_eq!(rank.own[0].download().unwrap(), [-1.0; BLOCKS]);
            }
            assert!(unchanged());
        }
    }
}

#[test]
fn ranges_and_sums_are_checked() {
    for device in devices() {
        let ranks = ranks(&device, &values(1, 1.0));
        let (rank, stream) = (&ranks[0], device.stream().unwrap());
        let (len, none) = (rank.arena.len(), device.alloc::<f64>(0).unwrap());
        for (counted, out) in [(4..8, &rank.own[0]), (0..len + 8, &rank.own[0]), (0..len, &none)] {
            let refused = rank.operands(Rule::Lamb).squares(&stream, counted, out).unwrap_err().to_string();
            assert!(refused.contains("cannot be counted"), "{refused}");
        }
        // Those of a part, and of nothing.
        rank.grads.write(&stream, &rank.cut(&values(100, 1.0))).unwrap();
        let grads = rank.grads.download().unwrap();
        for counted in [8..2024, 16..16] {
            rank.operands(Rule::Lamb).squares(&stream, counted.clone(), &rank.own[0]).unwrap();
            let sum: f64 = rank.own[0].download().unwrap().iter().sum();
            let want = oracle::sum_of_squares(&grads[counted]);
            assert!((sum - want).abs() <= 1e-12 * want, "{sum} and {want}");
        }
        let short =
            rank.operands(Rule::Lamb).lamb_squares(&stream, &rank.all[0], len, &rank.own[0]).unwrap_err();
        assert!(short.to_string().contains("out has 2 elements, expected 12"), "{short}");
        let odd = device.alloc::<f64>(13).unwrap();
        let odd = rank.operands(Rule::Lamb).lamb_of(&stream, &odd).unwrap_err();
        assert!(odd.to_string().contains("squares has 13 elements, expected 12"), "{odd}");
    }
}

#[test]
fn sums_of_two_arenas() {
    for device in devices() {
        let stream = device.stream().unwrap();
        for len in [8, 8192, 8200, 20_000] {
            let [a, b] = [1, 2].map(|seed| random::<f32>(len, seed));
            let (sum, x) = (device.upload(&a).unwrap(), device.upload(&b).unwrap());
            add(&stream, &sum, &x).unwrap();
            let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            assert_eq!(sum.download().unwrap(), want);
            assert_eq!(x.download().unwrap(), b);
        }
        let of = |len| device.alloc::<f32>(len).unwrap();
        let says = |out, x| add(&stream, &of(out), &of(x)).unwrap_err().to_string();
        assert!(says(12, 12).contains("multiple of 8") && says(0, 0).contains("at least 8"));
        assert!(says(16, 8).contains("x has 8 elements, expected 16"));
    }
}
