//! What the backward kernels and the CPU device in f64 make of a case, after the forward kernels.

use half::bf16;

use trencadis::cpu::attention::{AttentionConfig, QkAffine, QkAffineGrad, backward as oracle};
use trencadis::device::{Device, Stream};
use trencadis::kernels::Rows;
use trencadis::kernels::attention::{Backward, BackwardPlan, Schedule};
use trencadis::kernels::tolerance as to;
use trencadis::recipe::QkNormKind;

use crate::case::{Answer, Case, FOREIGN, Operand, Run, alike, is_mark, mark};
use crate::support::numbers::random;

/// What gradients of gains and biases are added to.
pub const BEFORE: f32 = 0.75;

/// How a case is run.
#[derive(Clone, Copy, Default)]
pub struct Way {
    /// Longest short image, where it is not what the device's shared memory allows.
    pub short: Option<usize>,
    /// Blocks of the grid, where they are not the device's.
    pub blocks: Option<u32>,
    /// Whether gradients of gains and biases are added to.
    pub accumulate: bool,
    /// A promise that no image has more rows.
    pub longest: Option<usize>,
}

pub const SHORT: Way = Way { short: None, blocks: Some(3), accumulate: false, longest: None };
pub const LONG: Way = Way { short: Some(0), blocks: Some(3), accumulate: false, longest: None };

/// Gradients: rows of q, k and v, all of them; of γq, βq, γk, βk.
#[derive(Clone, PartialEq)]
pub struct Gradients<E: Operand = bf16> {
    pub rows: [Vec<E>; 3],
    pub affine: [Vec<f32>; 4],
}

/// Gradients of the result, NaN where no image is.
pub fn dout<E: Operand>(case: &Case<E>) -> Vec<E> {
    let used = *case.cu_seqlens.last().unwrap() as usize * case.width();
    let mut dout: Vec<E> = random::<f64>(used, 11).into_iter().map(E::of).collect();
    dout.resize(case.tokens * case.width(), E::of(f64::NAN));
    dout
}

pub fn plan<E: Operand>(case: &Case<E>, device: &Device, way: Way) -> BackwardPlan {
    let mut plan = case.attention().backward_plan(device.info()).unwrap();
    if let Some(short) = way.short {
        plan = BackwardPlan::with_short_limit(plan.instance, short, device.info()).unwrap();
    }
    plan.blocks = way.blocks.unwrap_or(plan.blocks);
    plan
}

/// The result of the forward kernels, NaN where no image is.
pub fn forward<E: Operand>(case: &Case<E>, device: &Device) -> Answer<E> {
    let mut answer = case.run(device, Run::default());
    let used = *case.cu_seqlens.last().unwrap() as usize;
    answer.out[used * case.width()..].fill(E::of(f64::NAN));
    answer.lse[used * case.config.heads..].fill(f32::NAN);
    answer
}

pub fn run<E: Operand>(
    case: &Case<E>,
    device: &Device,
    way: Way,
    answer: &Answer<E>,
    dout: &[E],
) -> Gradients<E> {
    let attention = case.attention();
    let plan = plan(case, device, way);
    let (width, stride, slots) = (case.width(), case.stride(), case.cu_seqlens.len() - 1);
    let stream: Stream = device.stream().unwrap();
    let qkv = device.upload(&case.qkv).unwrap();
    let mark = vec![mark::<E>(); case.tokens * stride];
    let dqkv = device.upload(&mark).unwrap();
    let out = device.upload(&answer.out).unwrap();
    let dout = device.upload(dout).unwrap();
    let lse = device.upload(&answer.lse).unwrap();
    let affine = case.affine.each_ref().map(|x| x.as_ref().map(|x| device.upload(x).unwrap()));
    let rope = case.rope.as_ref().map(|x| device.upload(x).unwrap());
    let daffine = affine_lengths(case).map(|len| device.upload(&vec![BEFORE; len]).unwrap());
    let accumulate = device.upload(&[i32::from(way.accumulate)]).unwrap();
    let cu_seqlens = device.upload(&case.cu_seqlens).unwrap();
    let longest = way.longest.unwrap_or(case.tokens);
    let schedule = Schedule::new(device, plan.limits, case.tokens, slots).unwrap().with_longest(longest);
    let workspace = device.alloc::<u8>(attention.backward_workspace_bytes(&plan, longest, true)).unwrap();
    let [q, k, v] = case.offsets().map(|offset| Rows { buffer: &qkv, offset, stride });
    let [dq, dk, dv] = case.offsets().map(|offset| Rows { buffer: &dqkv, offset, stride });
    let operands = Backward {
        q,
        k,
        v,
        out: Rows::dense(&out, width),
        lse: &lse,
        dout: Rows::dense(&dout, width),
        affine: affine.each_ref().map(Option::as_ref),
        rope: rope.as_ref(),
        cu_seqlens: &cu_seqlens,
        schedule: &schedule,
        dq,
        dk,
        dv,
        daffine: daffine.each_ref().map(Some),
        accumulate: Some(&accumulate),
        workspace: &workspace,
    };
    schedule.launch(&stream, &cu_seqlens, Some(&case.cu_seqlens)).unwrap();
    attention.backward(&stream, &plan, &operands).unwrap();
    schedule.check().unwrap();
    let mut rows = [const { Vec::new() }; 3];
    let [_, k, v] = case.offsets();
    for row in dqkv.download().unwrap().chunks(stride) {
        let (own, others) = row.split_at(stride - FOREIGN);
        for (rows, part) in rows.iter_mut().zip([&own[..k], &own[k..v], &own[v..]]) {
            rows.extend_from_slice(part);
        }
        assert!(others.iter().all(is_mark), "columns of others were written");
    }
    Gradients { rows, affine: daffine.each_ref().map(|x| x.download().unwrap()) }
}

/// Elements of γq, βq, γk and βk.
fn affine_lengths<E: Operand>(case: &Case<E>) -> [usize; 4] {
    let AttentionConfig { heads, kv_heads, head_dim, gain_per_head, .. } = case.config;
    [heads, heads, kv_heads, kv_heads].map(|heads| if gain_per_head { heads } else { 1 } * head_dim)
}

/// Gradients of the used rows, and of gains and biases, on the CPU device.
pub fn expected<E: Operand>(case: &Case<E>, answer: &Answer<E>) -> ([Vec<f64>; 3], [Vec<f64>; 4]) {
    let (width, config) = (case.width(), case.config);
    let used = *case.cu_seqlens.last().unwrap() as usize;
    let wide = |x: &[E], len: usize| x[..len].iter().map(|x| x.wide()).collect::<Vec<_>>();
    let (qkv, rope) = (case.used_rows(), case.used_rope());
    let affine =
        case.affine.each_ref().map(|x| x.as_ref().map(|x| x.iter().map(|&x| x.into()).collect::<Vec<f64>>()));
    let [q_gain, q_bias, k_gain, k_bias] = affine.each_ref().map(Option::as_deref);
    let mut daffine = affine_lengths(case).map(|len| vec![0.0; len]);
    let [dq_gain, dq_bias, dk_gain, dk_bias] = daffine.each_mut().map(|x| Some(x.as_mut_slice()));
    let mut dqkv = vec![f64::NAN; used * config.qkv_width()];
    let lse: Vec<f64> = answer.lse[..used * config.heads].iter().map(|&x| x.into()).collect();
    oracle(
        &config,
        &mut dqkv,
        QkAffineGrad { q_gain: dq_gain, k_gain: dk_gain, q_bias: dq_bias, k_bias: dk_bias },
        &wide(&dout(case), used * width),
        &wide(&answer.out, used * width),
        &lse,
        &qkv,
        QkAffine { q_gain, k_gain, q_bias, k_bias },
        rope.as_deref(),
        &case.cu_seqlens,
    );
    let mut rows = [const { Vec::new() }; 3];
    let [_, k, v] = case.offsets();
    for row in dqkv.chunks(config.qkv_width()) {
        for (rows, part) in rows.iter_mut().zip([&row[..k], &row[k..v], &row[v..]]) {
            rows.extend_from_slice(part);
        }
    }
    (rows, daffine)
}

/// Runs, and compares with the CPU device; rows that belong to no image must be zeros.
#[track_caller]
pub fn check<E: Operand>(case: &Case<E>, device: &Device, ways: &[Way]) -> Vec<Gradients<E>> {
    let answer = forward(case, device);
    let (rows, affine) = expected(case, &answer);
    let mut all = Vec::new();
    for &way in ways {
        let name = format!("{} {:?} {:?} short {:?}", E::NAME, case.config, case.cu_seqlens, way.short);
        let got = run(case, device, way, &answer, &dout(case));
        for ((got, want), of) in got.rows.iter().zip(&rows).zip(["dq", "dk", "dv"]) {
            let got: Vec<f64> = got.iter().map(|x| x.wide()).collect();
            let within = to::ATTENTION_GRAD.finer(E::FINER);
            alike(&format!("{of} of {name}"), &got, want, within.metric, within.largest);
        }
        for (i, of) in ["dq_gain", "dq_bias", "dk_gain", "dk_bias"].into_iter().enumerate() {
            if case.config.norm == QkNormKind::None {
                assert!(got.affine[i].iter().all(|&x| x == BEFORE), "{of} without a norm");
                continue;
            }
            let before = if way.accumulate { f64::from(BEFORE) } else { 0.0 };
            let sums: Vec<f64> = got.affine[i].iter().map(|&x| f64::from(x) - before).collect();
            // A bias of k that is the same for all keys cancels in the softmax: its gradient is the rounding of zero.
            if i == 3 && case.rope.is_none() {
                let scale = affine[1].iter().fold(1e-30f64, |max, x| max.max(x.abs()));
                let worst = sums.iter().fold(0f64, |max, x| max.max(x.abs())) / scale;
                assert!(worst < 0.1, "{of} of {name}: {worst}");
            } else {
                let within = to::ATTENTION_AFFINE_GRAD.finer(E::FINER);
                alike(&format!("{of} of {name}"), &sums, &affine[i], within.metric, within.largest);
            }
        }
        all.push(got);
    }
    all
}
