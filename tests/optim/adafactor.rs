//! Adafactor's kernels against the CPU device: whole matrices, and slices of them on several ranks.

use std::ops::Range;

use half::bf16;
use trencadis::cpu::optim::adafactor::{self as oracle, Adafactor, Factoring};
use trencadis::cpu::optim::{moving_average, sum_of_squares};
use trencadis::device::{Buffer, Device};
use trencadis::kernels::optim::{
    Arena, Lines, Moments, Operands, OptimizerState, OptimizerStep, SliceSpec, StatisticTables, Statistics,
    Tables, TensorSpec, WholeSpec, workspace_bytes,
};

use crate::support::devices::devices;
use crate::support::numbers::random;

/// Shapes and weight decays. Columns that eight divides and others, several tiles, and what is not factored.
const TENSORS: [(&[usize], f64); 6] =
    [(&[70, 300], 0.05), (&[33, 37], 0.3), (&[31, 40], 0.1), (&[9], 0.0), (&[40, 64], 0.2), (&[100], 0.0)];
/// Zeros behind each row in memory.
const PADDING: [usize; 6] = [4, 0, 8, 7, 0, 0];
/// Tensors from here on are on every rank, and count on the first.
const SHARED: usize = 4;
const STEP: OptimizerStep = OptimizerStep {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.5,
    beta2_power: 0.8,
    eps: 1e-8,
    clip: 1.0,
    ema_decay: 0.75,
    images: 0.0,
    seed: 0,
    continues: 0,
    unfinished: 0,
};

type Values = Vec<Vec<f32>>;

fn len(tensor: usize) -> usize {
    TENSORS[tensor].0.iter().product()
}

fn values(seed: u64, scale: f32) -> Values {
    let tensor = |i: usize| random::<f32>(len(i), seed + i as u64).into_iter().map(|x| scale * x).collect();
    (0..TENSORS.len()).map(tensor).collect()
}

/// Columns without and with padding.
fn columns(tensor: usize) -> [usize; 2] {
    let columns = *TENSORS[tensor].0.last().unwrap();
    [columns, columns + PADDING[tensor]]
}

/// State of the CPU device.
struct Reference {
    p: Values,
    average: Values,
    m: Vec<Vec<bf16>>,
    v: Values,
}

impl Reference {
    fn new() -> Self {
        let p = values(1, 1.0);
        let factorings = TENSORS.map(|(shape, _)| Factoring::of(shape));
        Self {
            average: p.clone(),
            m: p.iter().map(|p| vec![bf16::ZERO; p.len()]).collect(),
            v: factorings.map(|factoring| vec![0.0; factoring.len()]).into(),
            p,
        }
    }

    /// Returns the norm.
    fn step(&mut self, t: u64, grads: &Values) -> f64 {
        let norm = grads.iter().map(|grad| sum_of_squares(grad)).sum::<f64>().sqrt();
        let grad_scale = if norm > STEP.clip { STEP.clip / norm } else { 1.0 };
        for (i, (shape, weight_decay)) in TENSORS.into_iter().enumerate() {
            let (factoring, all, grad) = (Factoring::of(shape), 0..len(i), &grads[i]);
            let config = Adafactor { lr: STEP.lr, momentum: STEP.beta1, weight_decay, grad_scale };
            let mut sums = vec![0.0; factoring.len()];
            oracle::add_squares(factoring, all.clone(), grad, grad_scale, &mut sums);
            let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
            let keep = oracle::second_decay(t, STEP.beta2_power, STEP.beta2);
            let factors = oracle::update(factoring, keep, &sums, &mut self.v[i]);
            oracle::apply((&config, factoring), all, &factors, &mut self.p[i], &mut self.m[i], grad);
            moving_average(&mut self.average[i], &self.p[i], STEP.ema_decay);
        }
        norm
    }
}

struct Rank {
    arena: Arena,
    /// Tensor and padded elements of each slice.
    slices: Vec<Option<(usize, Range<usize>)>>,
    counted: usize,
    tables: Tables,
    statistics: Statistics,
    statistic_tables: StatisticTables,
    params: Buffer<f32>,
    grads: Buffer<f32>,
    m: Buffer<bf16>,
    v: Buffer<f32>,
    weights: Buffer<bf16>,
    average: Buffer<f32>,
    step: Buffer<OptimizerStep>,
    state: Buffer<OptimizerState>,
    workspace: Buffer<u8>,
}

impl Rank {
    /// Slices of tensors are cut at multiples of 8 elements, with room between them.
    fn new(device: &Device, rank: usize, ranks: usize) -> Self {
        let mut slices: Vec<Option<(usize, Range<usize>)>> = Vec::new();
        let mut counted = None;
        for tensor in 0..TENSORS.len() {
            let [dense, padded] = columns(tensor);
            let all = len(tensor) / dense * padded;
            let piece = (all.div_ceil(8)).div_ceil(ranks) * 8;
            let own = match tensor < SHARED {
                true => (rank * piece).min(all)..((rank + 1) * piece).min(all),
                false => 0..all,
            };
            if tensor == SHARED {
                counted = Some(slices.len());
            }
            if !own.is_empty() {
                slices.push(Some((tensor, own)));
            }
            if tensor == 1 {
                slices.push(None);
            }
        }
        let spec = |slice: &Option<(usize, Range<usize>)>| {
            let (len, whole) = slice.as_ref().map_or((64, None), |(tensor, own)| (own.len(), Some(*tensor)));
            let weight_decay = whole.map_or(0.0, |tensor| TENSORS[tensor].1);
            SliceSpec { spec: TensorSpec { len, weight_decay, adapts: false }, whole }
        };
        let specs: Vec<SliceSpec> = slices.iter().map(spec).collect();
        let arena = Arena::of_slices(&specs, TENSORS.len()).unwrap();
        let factorings = TENSORS.map(|(shape, _)| Factoring::of(shape));
        let wholes = factorings.map(|factoring| match factoring.factored() {
            Some(shape) => WholeSpec::Matrix(shape),
            None => WholeSpec::Elements(factoring.len()),
        });
        let lines = |slice: &Option<(usize, Range<usize>)>| {
            let Some((tensor, elements)) = slice else { return Lines::None };
            let first: usize = factorings[..*tensor].iter().map(|factoring| factoring.len()).sum();
            let [dense, padded] = columns(*tensor);
            match factorings[*tensor].factored() {
                None => Lines::Elements(
                    elements
                        .clone()
                        .map(|at| (at % padded < dense).then(|| first + at / padded * dense + at % padded))
                        .collect(),
                ),
                Some([rows, _]) => Lines::Matrix {
                    elements: elements.clone(),
                    rows: (elements.start / padded..elements.end.div_ceil(padded))
                        .map(|row| Some(first + row))
                        .collect(),
                    columns: (0..padded)
                        .map(|column| (column < dense).then_some(first + rows + column))
                        .collect(),
                },
            }
        };
        let lines: Vec<Lines> = slices.iter().map(lines).collect();
        let statistics = Statistics::new(&arena, &lines, &wholes).unwrap();
        let counted = if rank == 0 { arena.len() } else { arena.ranges()[counted.unwrap()].start };
        let this = Self {
            tables: arena.upload(device).unwrap(),
            statistic_tables: statistics.upload(device).unwrap(),
            params: device.zeros(arena.len()).unwrap(),
            grads: device.zeros(arena.len()).unwrap(),
            m: device.zeros(arena.len()).unwrap(),
            v: device.zeros(statistics.len()).unwrap(),
            weights: device.zeros(arena.len()).unwrap(),
            average: device.zeros(arena.len()).unwrap(),
            step: device.upload(&[STEP]).unwrap(),
            state: device.zeros(1).unwrap(),
            workspace: device.alloc(workspace_bytes(&arena, device)).unwrap(),
            statistics,
            slices,
            counted,
            arena,
        };
        let stream = device.stream().unwrap();
        let start = this.cut(&values(1, 1.0));
        this.params.write(&stream, &start).unwrap();
        this.average.write(&stream, &start).unwrap();
        stream.synchronize().unwrap();
        this
    }

    /// This rank's slices of whole tensors, padded.
    fn cut(&self, values: &Values) -> Vec<f32> {
        let mut arena = vec![0.0; self.arena.len()];
        for (at, slice) in self.arena.ranges().iter().zip(&self.slices) {
            let Some((tensor, own)) = slice else { continue };
            let [dense, padded] = columns(*tensor);
            for (to, element) in arena[at.clone()].iter_mut().zip(own.clone()) {
                if element % padded < dense {
                    *to = values[*tensor][element / padded * dense + element % padded];
                }
            }
        }
        arena
    }

    fn operands(&self, full: bool) -> Operands<'_> {
        Operands {
            arena: &self.arena,
            tables: &self.tables,
            params: &self.params,
            grads: &self.grads,
            moments: Moments::Factored {
                m: &self.m,
                v: &self.v,
                statistics: &self.statistics,
                tables: &self.statistic_tables,
            },
            weights: full.then_some(&self.weights),
            average: full.then_some(&self.average),
            step: &self.step,
            state: &self.state,
            squared: None,
            stochastic: false,
            workspace: &self.workspace,
        }
    }

    /// Everything that a step may change.
    fn all(&self) -> [Vec<u32>; 5] {
        let single = |x: &Buffer<f32>| x.download().unwrap().into_iter().map(f32::to_bits).collect();
        let half = |x: &Buffer<bf16>| x.download().unwrap().into_iter().map(|x| x.to_bits().into()).collect();
        [single(&self.params), half(&self.m), single(&self.v), single(&self.average), half(&self.weights)]
    }

    #[track_caller]
    fn follows(&self, want: &Reference, state: OptimizerState, (t, norm): (u64, f64)) {
        assert_eq!((state.step, state.skipped, state.factors.skip), (t, 0, 0));
        assert!((state.norm - norm).abs() <= 1e-12 * norm, "{} and {norm}", state.norm);
        // Sums have another order; so a momentum may be rounded to the other side, from which the next step goes on.
        let near = |name: &str, got: Vec<f32>, want: Vec<f32>, relative: f32, absolute: f32| {
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let close = (got - want).abs() <= relative * want.abs() + absolute;
                assert!(close, "{name}[{i}]: {got} instead of {want}");
            }
        };
        let params = self.params.download().unwrap();
        near("p", params.clone(), self.cut(&want.p), 1e-6, 2e-5);
        near("average", self.average.download().unwrap(), self.cut(&want.average), 1e-6, 2e-5);
        // Padding has no second moments, and stays without.
        let mut v = want.v.concat();
        v.resize(self.statistics.len(), 0.0);
        near("v", self.v.download().unwrap(), v, 1e-6, 0.0);
        let wide = |m: &Vec<bf16>| -> Vec<f32> { m.iter().map(|m| m.to_f32()).collect() };
        let m = want.m.iter().map(wide).collect();
        near("m", wide(&self.m.download().unwrap()), self.cut(&m), 2f32.powi(-7), 1e-3);
        for (weight, p) in self.weights.download().unwrap().iter().zip(&params) {
            assert_eq!(weight.to_bits(), bf16::from_f32(*p).to_bits());
        }
    }
}

/// The first gradients are clipped, the others are not.
fn grads(t: u64) -> Values {
    values(100 * t, if t == 1 { 1.0 } else { 1e-4 })
}

#[test]
fn whole_matrices_follow_the_cpu() {
    for device in devices() {
        let (rank, mut want) = (Rank::new(&device, 0, 1), Reference::new());
        let stream = device.stream().unwrap();
        for t in 1..=3 {
            rank.grads.write(&stream, &rank.cut(&grads(t))).unwrap();
            rank.operands(true).adafactor(&stream).unwrap();
            stream.synchronize().unwrap();
            let norm = want.step(t, &grads(t));
            rank.follows(&want, rank.state.download().unwrap()[0], (t, norm));
        }
    }
}

#[test]
fn slices_of_ranks_step_as_whole_matrices_do() {
    const RANKS: usize = 3;
    for device in devices() {
        let ranks: Vec<Rank> = (0..RANKS).map(|rank| Rank::new(&device, rank, RANKS)).collect();
        let (mut want, stream) = (Reference::new(), device.stream().unwrap());
        let squares = device.zeros::<f64>(2 * RANKS).unwrap();
        let own = device.zeros::<f64>(2).unwrap();
        for t in 1..=2 {
            let mut all = Vec::new();
            for rank in &ranks {
                rank.grads.write(&stream, &rank.cut(&grads(t))).unwrap();
                rank.operands(true).squares(&stream, 0..rank.counted, &own).unwrap();
                all.extend(own.download().unwrap());
            }
            squares.write(&stream, &all).unwrap();
            let mut sums = vec![0.0f32; ranks[0].statistics.len()];
            for rank in &ranks {
                rank.operands(true).adafactor_sums(&stream, &squares, rank.counted).unwrap();
                let own = rank.statistic_tables.sums.download().unwrap();
                sums.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
            }
            for rank in &ranks {
                rank.statistic_tables.sums.write(&stream, &sums).unwrap();
                rank.operands(true).adafactor_of(&stream).unwrap();
            }
            stream.synchronize().unwrap();
            let norm = want.step(t, &grads(t));
            for rank in &ranks {
                rank.follows(&want, rank.state.download().unwrap()[0], (t, norm));
                assert_eq!(rank.all()[2], ranks[0].all()[2], "the same bits everywhere");
            }
        }
    }
}

#[test]
fn what_no_step_follows_from_changes_nothing() {
    for device in devices() {
        let (rank, stream) = (Rank::new(&device, 0, 1), device.stream().unwrap());
        let step = |grads: &Values| {
            rank.grads.write(&stream, &rank.cut(grads)).unwrap();
            rank.operands(true).adafactor(&stream).unwrap();
            stream.synchronize().unwrap();
            rank.state.download().unwrap()[0]
        };
        assert_eq!(step(&grads(1)).step, 1);
        let before = rank.all();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut grads = grads(2);
            grads[0][4567] = bad;
            assert_eq!(step(&grads).step, 1);
            assert!(rank.all() == before);
        }
        rank.step.write(&stream, &[OptimizerStep { unfinished: 1, ..STEP }]).unwrap();
        step(&grads(2));
        assert!(rank.all() == before);
        rank.step.write(&stream, &[STEP]).unwrap();
        assert_eq!(step(&grads(2)).step, 2);
        assert!(rank.all() != before);
    }
}

#[test]
fn copies_are_optional_and_steps_repeat() {
    for device in devices() {
        let (one, other) = (Rank::new(&device, 0, 1), Rank::new(&device, 0, 1));
        let stream = device.stream().unwrap();
        let before = other.all();
        for (rank, full) in [(&one, true), (&other, false)] {
            rank.grads.write(&stream, &rank.cut(&grads(1))).unwrap();
            rank.operands(full).adafactor(&stream).unwrap();
        }
        let ([p, m, v, ..], [other_p, other_m, other_v, average, weights]) = (one.all(), other.all());
        assert!((p, m, v) == (other_p, other_m, other_v));
        assert!((&average, &weights) == (&before[3], &before[4]));

        let short = device.zeros::<bf16>(8).unwrap();
        let Moments::Factored { v, statistics, tables, .. } = one.operands(true).moments else { panic!() };
        let moments = Moments::Factored { m: &short, v, statistics, tables };
        let refused = Operands { moments, ..one.operands(true) }.adafactor(&stream).unwrap_err().to_string();
        assert!(refused.contains("m has 8 elements"), "{refused}");
        let refused = one.operands(true).adamw(&stream).unwrap_err().to_string();
        assert_eq!(refused, "AdamW was given the moments of Adafactor; give its own");
    }
}
