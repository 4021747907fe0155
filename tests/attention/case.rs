//! A batch for the attention kernels, and what the CPU device in f64 makes of it.

use half::{bf16, f16};

use trencadis::cpu::attention::forward as oracle;
use trencadis::cpu::attention::{AttentionConfig, QkAffine};
use trencadis::device::{Buffer, Device};
use trencadis::kernels::attention::{Attention, Forward, ForwardPlan, Schedule, Statistics};
use trencadis::kernels::tolerance::{self as to, Tolerance};
use trencadis::kernels::{Element, Rows};
use trencadis::recipe::{QkNormKind, Rope};

use crate::support::numbers::random;

/// Columns that follow every row and belong to somebody else.
pub const FOREIGN: usize = 8;
/// What stands there.
const MARK: u16 = 0x4321;

/// What the operands of a case are made of.
pub trait Operand: Element {
    /// How much smaller its last place is than that of bf16, and so what is asked of the kernels.
    const FINER: f64;

    fn of(x: f64) -> Self;

    fn wide(self) -> f64;
}

impl Operand for bf16 {
    const FINER: f64 = 1.0;

    fn of(x: f64) -> Self {
        Self::from_f64(x)
    }

    fn wide(self) -> f64 {
        self.to_f64()
    }
}

impl Operand for f16 {
    const FINER: f64 = to::F16_FINER;

    fn of(x: f64) -> Self {
        Self::from_f64(x)
    }

    fn wide(self) -> f64 {
        self.to_f64()
    }
}

/// What stands in columns of others.
pub fn mark<E: Operand>() -> E {
    bytemuck::cast(MARK)
}

/// Whether it still does.
pub fn is_mark<E: Operand>(x: &E) -> bool {
    bytemuck::cast::<E, u16>(*x) == MARK
}

/// Images of `lengths` tokens with a tail of padding full of NaN.
#[derive(Clone)]
pub struct Case<E: Operand = bf16> {
    pub config: AttentionConfig,
    pub cu_seqlens: Vec<i32>,
    pub tokens: usize,
    /// `[T][q | k | v | foreign]`.
    pub qkv: Vec<E>,
    /// γq, βq, γk, βk.
    pub affine: [Option<Vec<f32>>; 4],
    /// `[T, head_dim/2, 2]`, cosine and sine, where the config has a rotation.
    pub rope: Option<Vec<f32>>,
}

/// How a case is run.
#[derive(Clone, Copy, Default)]
pub struct Run {
    /// Longest short image, where it is not what the device's shared memory allows.
    pub short: Option<usize>,
    /// Blocks of the grids, where they are not the device's.
    pub blocks: Option<u32>,
    /// Whether the statistics of the norm are kept.
    pub statistics: bool,
    /// A promise that no image has more rows.
    pub longest: Option<usize>,
    /// Which of the device's plans, the first being the one that is taken without measuring.
    pub plan: usize,
    /// Whether Hopper's blocks are pairs, where it is not as the plan says.
    pub pairs: Option<bool>,
}

#[derive(Clone, PartialEq)]
pub struct Answer<E: Operand = bf16> {
    pub out: Vec<E>,
    pub lse: Vec<f32>,
    /// Means and deviations of q, of k.
    pub statistics: [Vec<f32>; 4],
}

pub fn starts(lengths: &[usize]) -> Vec<i32> {
    let mut cu_seqlens = vec![0];
    for length in lengths {
        cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + *length as i32);
    }
    cu_seqlens
}

pub fn config(norm: QkNormKind, heads: usize, head_dim: usize) -> AttentionConfig {
    let scale = 1.0 / (head_dim as f64).sqrt();
    let rope = Rope::None;
    AttentionConfig { heads, kv_heads: heads, head_dim, scale, norm, eps: 1e-6, gain_per_head: false, rope }
}

/// Every rotation with every norm and with heads of k and v for each head of q, for two of them, and for all: each head dim,
/// between the widths of the kernels and of them, with both rotations.
pub fn rotations() -> impl Iterator<Item = AttentionConfig> {
    let norms = [QkNormKind::None, QkNormKind::Rms, QkNormKind::LayerNormBias];
    let heads = [(2, 2), (4, 2), (3, 1)];
    let dims = [40, 64, 72, 80, 128, 8, 88, 120, 56];
    dims.into_iter().enumerate().flat_map(move |(i, dim)| {
        let (norm, (heads, kv_heads)) = (norms[i % 3], heads[(i / 3 + i) % 3]);
        let config = AttentionConfig { kv_heads, gain_per_head: i / 3 != 1, ..config(norm, heads, dim) };
        [Rope::Interleaved, Rope::Halves].map(|rope| AttentionConfig { rope, ..config })
    })
}

/// Angles of `used` tokens and NaN for those behind; every fifth has none, like tokens without a place.
fn table(used: usize, tokens: usize, head_dim: usize) -> Vec<f32> {
    let angles = random::<f64>(used * head_dim / 2, 8);
    let angle = |i: usize| if (i / (head_dim / 2)).is_multiple_of(5) { 0.0 } else { 4.0 * angles[i] };
    let pairs = (0..angles.len()).flat_map(|i| [angle(i).cos() as f32, angle(i).sin() as f32]);
    pairs.chain(std::iter::repeat(f32::NAN)).take(tokens * head_dim).collect()
}

impl Case {
    /// One of bf16.
    pub fn new(config: AttentionConfig, lengths: &[usize], tail: usize) -> Self {
        Self::of(config, lengths, tail)
    }
}

impl<E: Operand> Case<E> {
    /// All gains and biases are there, as far as the norm has any.
    pub fn of(config: AttentionConfig, lengths: &[usize], tail: usize) -> Self {
        let used: usize = lengths.iter().sum();
        let tokens = used + tail;
        let width = config.qkv_width();
        let mut values = random::<f64>(used * width, 3).into_iter();
        let mut qkv = Vec::new();
        for row in 0..tokens {
            // A mean that LayerNorm must take off, unlike for every row.
            let offset = (row % 5) as f64 * 0.25;
            qkv.extend((0..width).map(|_| E::of(values.next().map_or(f64::NAN, |x| x + offset))));
            qkv.extend([E::of(f64::NAN); FOREIGN]);
        }
        let affine = |heads: usize, seed: u64, one: f32| {
            let heads = if config.gain_per_head { heads } else { 1 };
            let x = random::<f32>(heads * config.head_dim, seed);
            Some(x.into_iter().map(|x| one + 0.2 * x).collect())
        };
        let biased = config.norm == QkNormKind::LayerNormBias;
        let affine = match config.norm {
            QkNormKind::None => [const { None }; 4],
            _ => [
                affine(config.heads, 4, 1.0),
                affine(config.heads, 5, 0.0).filter(|_| biased),
                affine(config.kv_heads, 6, 1.0),
                affine(config.kv_heads, 7, 0.0).filter(|_| biased),
            ],
        };
        let rope = (config.rope != Rope::None).then(|| table(used, tokens, config.head_dim));
        Self { config, cu_seqlens: starts(lengths), tokens, qkv, affine, rope }
    }

    pub fn width(&self) -> usize {
        self.config.heads * self.config.head_dim
    }

    /// The same with a head of k and v, and gains, for each head of q.
    pub fn ungrouped(&self) -> Self {
        let AttentionConfig { heads, head_dim, gain_per_head, .. } = self.config;
        let group = self.config.group();
        let repeated =
            |part: &[E]| -> Vec<E> { part.chunks(head_dim).flat_map(|head| head.repeat(group)).collect() };
        let [_, k, v] = self.offsets();
        let mut qkv = Vec::new();
        for row in self.qkv.chunks(self.stride()) {
            let (own, others) = row.split_at(self.config.qkv_width());
            qkv.extend(
                [own[..k].to_vec(), repeated(&own[k..v]), repeated(&own[v..]), others.to_vec()].concat(),
            );
        }
        let mut affine = self.affine.clone();
        for gain in affine[2..].iter_mut().flatten().filter(|_| gain_per_head) {
            *gain = gain.chunks(head_dim).flat_map(|head| head.repeat(group)).collect();
        }
        let config = AttentionConfig { kv_heads: heads, ..self.config };
        Self { config, qkv, affine, ..self.clone() }
    }

    /// Columns of a row of q, k and v, and of others.
    pub fn stride(&self) -> usize {
        self.config.qkv_width() + FOREIGN
    }

    /// First columns of q, k and v.
    pub fn offsets(&self) -> [usize; 3] {
        [0, self.width(), self.width() + self.config.kv_width()]
    }

    /// Used rows of q, k and v, `[q | k | v]`.
    pub fn used_rows(&self) -> Vec<f64> {
        let used = self.cu_seqlens[self.cu_seqlens.len() - 1] as usize;
        (self.qkv.chunks(self.stride()).take(used))
            .flat_map(|row| row[..self.config.qkv_width()].iter().map(|x| x.wide()))
            .collect()
    }

    /// Angles of the used rows.
    pub fn used_rope(&self) -> Option<Vec<f64>> {
        let used = self.cu_seqlens[self.cu_seqlens.len() - 1] as usize;
        let wide =
            |table: &Vec<f32>| table[..used * self.config.head_dim].iter().map(|&x| x.into()).collect();
        self.rope.as_ref().map(wide)
    }

    pub fn attention(&self) -> Attention {
        Attention { config: self.config, tokens: self.tokens, slots: self.cu_seqlens.len() - 1 }
    }

    pub fn plan(&self, device: &Device, run: Run) -> ForwardPlan {
        let plans = ForwardPlan::plans(self.config.head_dim, device.info());
        assert_eq!(plans[0], self.attention().plan(device.info()).unwrap());
        let mut plan = plans[run.plan];
        if let Some(short) = run.short {
            let ForwardPlan { turns, pairs, .. } = plan;
            plan = ForwardPlan::with_short_limit(plan.instance, short, device.info()).unwrap();
            plan = ForwardPlan { turns, ..plan.with_pairs(pairs) };
        }
        if let Some(pairs) = run.pairs {
            plan = plan.with_pairs(pairs);
        }
        plan.blocks = run.blocks.unwrap_or(plan.blocks);
        plan
    }

    pub fn run(&self, device: &Device, run: Run) -> Answer<E> {
        let (answer, schedule) = self.launch(device, run, Some(&self.cu_seqlens));
        schedule.check().unwrap();
        answer
    }

    /// The same with what is wrong with `cu_seqlens` left to the device.
    pub fn run_unchecked(&self, device: &Device, run: Run) -> Answer<E> {
        let (answer, schedule) = self.launch(device, run, None);
        schedule.check().unwrap_err();
        answer
    }

    fn launch(&self, device: &Device, run: Run, host: Option<&[i32]>) -> (Answer<E>, Schedule) {
        let plan = self.plan(device, run);
        let (width, stride) = (self.width(), self.stride());
        let slots = self.cu_seqlens.len() - 1;
        let stream = device.stream().unwrap();
        let qkv = device.upload(&self.qkv).unwrap();
        let out = device.upload(&vec![mark::<E>(); self.tokens * (width + FOREIGN)]).unwrap();
        let of_rows = |heads: usize| device.alloc::<f32>(self.tokens * heads).unwrap();
        let AttentionConfig { heads, kv_heads, .. } = self.config;
        let lse = of_rows(heads);
        let statistics = [heads, heads, kv_heads, kv_heads].map(of_rows);
        let [q_mean, q_rstd, k_mean, k_rstd] = &statistics;
        let affine = self.affine.each_ref().map(|x| x.as_ref().map(|x| device.upload(x).unwrap()));
        let rope = self.rope.as_ref().map(|x| device.upload(x).unwrap());
        let cu_seqlens = device.upload(&self.cu_seqlens).unwrap();
        let schedule = Schedule::new(device, plan.limits, self.tokens, slots)
            .unwrap()
            .with_longest(run.longest.unwrap_or(self.tokens));
        let bytes = self.attention().forward_workspace_bytes(&plan, schedule.longest());
        let workspace = (bytes > 0).then(|| device.alloc::<u8>(bytes).unwrap());
        let [q, k, v] = self.offsets().map(|offset| Rows { buffer: &qkv, offset, stride });
        let operands = Forward {
            q,
            k,
            v,
            affine: affine.each_ref().map(Option::as_ref),
            rope: rope.as_ref(),
            cu_seqlens: &cu_seqlens,
            schedule: &schedule,
            out: Rows { buffer: &out, offset: 0, stride: width + FOREIGN },
            lse: &lse,
            statistics: run.statistics.then_some(Statistics { q_mean, q_rstd, k_mean, k_rstd }),
            workspace: workspace.as_ref(),
        };
        schedule.launch(&stream, &cu_seqlens, host).unwrap();
        self.attention().forward(&stream, &plan, &operands).unwrap();
        let read = |x: &Buffer<f32>| x.download().unwrap();
        let all = out.download().unwrap();
        let mut out = Vec::new();
        for row in all.chunks(width + FOREIGN) {
            out.extend(&row[..width]);
            assert!(row[width..].iter().all(is_mark), "columns of others were written");
        }
        let statistics =
            if run.statistics { statistics.each_ref().map(read) } else { [const { Vec::new() }; 4] };
        (Answer { out, lse: read(&lse), statistics }, schedule)
    }

    /// Result and log-sum-exp of the used rows on the CPU device.
    pub fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let used = self.cu_seqlens[self.cu_seqlens.len() - 1] as usize;
        let (width, rope) = (self.width(), self.used_rope());
        let affine = self
            .affine
            .each_ref()
            .map(|x| x.as_ref().map(|x| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>()));
        let [q_gain, q_bias, k_gain, k_bias] = affine.each_ref().map(Option::as_deref);
        let (mut out, mut lse) = (vec![f64::NAN; used * width], vec![f64::NAN; used * self.config.heads]);
        let affine = QkAffine { q_gain, k_gain, q_bias, k_bias };
        let qkv = self.used_rows();
        oracle(&self.config, &mut out, &mut lse, &qkv, affine, rope.as_deref(), &self.cu_seqlens);
        (out, lse)
    }

    /// Means and deviations of q and k of the used rows, in f64.
    pub fn expected_statistics(&self) -> [Vec<f64>; 4] {
        let (width, dim) = (self.width(), self.config.head_dim);
        let mut all = [const { Vec::new() }; 4];
        for row in self.used_rows().chunks(self.config.qkv_width()) {
            let (q, k) = (&row[..width], &row[width..][..self.config.kv_width()]);
            for (part, both) in [q, k].into_iter().zip(all.chunks_mut(2)) {
                for head in part.chunks(dim) {
                    let sum = |f: &dyn Fn(f64) -> f64| head.iter().map(|&x| f(x)).sum::<f64>();
                    let mean =
                        if self.config.norm == QkNormKind::Rms { 0.0 } else { sum(&|x| x) / dim as f64 };
                    let variance = sum(&|x| (x - mean) * (x - mean)) / dim as f64;
                    both[0].push(mean);
                    both[1].push(1.0 / (variance + self.config.eps).sqrt());
                }
            }
        }
        all
    }

    /// Runs, and compares with the CPU device; rows that belong to no image must be zeros.
    #[track_caller]
    pub fn check(&self, device: &Device, run: Run) -> Answer<E> {
        let name = format!("{} {:?} {:?}", E::NAME, self.config, self.cu_seqlens);
        let answer = self.run(device, run);
        let (out, lse) = self.expected();
        let wide: Vec<f64> = answer.out.iter().map(|x| x.wide()).collect();
        let within = to::ATTENTION.finer(E::FINER);
        alike(&format!("out of {name}"), &wide, &out, within.metric, within.largest);
        // Without a norm and a rotation the operands of the scores are exact.
        let exact = self.config.norm == QkNormKind::None && self.rope.is_none();
        let tolerance = if exact { 2e-5 } else { 2e-2 / E::FINER };
        near(&format!("lse of {name}"), &answer.lse, &lse, tolerance);
        if run.statistics {
            for (got, want) in answer.statistics.iter().zip(&self.expected_statistics()) {
                near(&format!("statistics of {name}"), got, want, 2e-6);
            }
        }
        answer
    }
}

/// As [`numbers::alike`](crate::support::numbers::alike); zeros behind.
#[track_caller]
pub fn alike(name: &str, got: &[f64], want: &[f64], metric: f64, largest: f64) {
    let (got, tail) = got.split_at(want.len());
    assert!(tail.iter().all(|&x| x == 0.0), "{name}: rows of no image are not zeros");
    crate::support::numbers::alike(name, got, want, Tolerance { metric, largest });
}

/// |got − want| ≤ tolerance · max(1, |want|); zeros behind.
#[track_caller]
pub fn near(name: &str, got: &[f32], want: &[f64], tolerance: f64) {
    let (got, tail) = got.split_at(want.len());
    assert!(tail.iter().all(|&x| x == 0.0), "{name}: rows of no image are not zeros");
    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= tolerance * want.abs().max(1.0), "{name}, element {i}: {got} instead of {want}");
    }
}
