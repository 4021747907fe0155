//! What the backward kernels and the CPU device in f64 make of a case, after the forward kernels.

use half::bf16;

use trencadis::cpu::attention::{QkAffine, QkAffineGrad, backward as oracle};
use trencadis::device::{Device, Stream};
use trencadis::kernels::Rows;
use trencadis::kernels::attention::{Backward, BackwardPlan, Schedule};
use trencadis::kernels::tolerance as to;
use trencadis::recipe::QkNormKind;

use crate::case::{Answer, Case, FOREIGN, Run, alike};
use crate::support::numbers::random;

/// What gradients of gains and biases are added to.
pub const BEFORE: f32 = 0.75;
/// What stands in columns of others.
pub const MARK: u16 = 0x4321;

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
pub struct Gradients {
    pub rows: [Vec<bf16>; 3],
    pub affine: [Vec<f32>; 4],
}

/// Gradients of the result, NaN where no image is.
pub fn dout(case: &Case) -> Vec<bf16> {
    let used = *case.cu_seqlens.last().unwrap() as usize * case.width();
    let mut dout: Vec<bf16> = random::<f64>(used, 11).into_iter().map(bf16::from_f64).collect();
    dout.resize(case.tokens * case.width(), bf16::NAN);
    dout
}

pub fn plan(case: &Case, device: &Device, way: Way) -> BackwardPlan {
    let mut plan = case.attention().backward_plan(device.info()).unwrap();
    if let Some(short) = way.short {
        plan = BackwardPlan::with_short_limit(plan.instance, short, device.info()).unwrap();
    }
    plan.blocks = way.blocks.unwrap_or(plan.blocks);
    plan
}

/// The result of the forward kernels, NaN where no image is.
pub fn forward(case: &Case, device: &Device) -> Answer {
    let mut answer = case.run(device, Run::default());
    let used = *case.cu_seqlens.last().unwrap() as usize;
    answer.out[used * case.width()..].fill(bf16::NAN);
    answer.lse[used * case.config.heads..].fill(f32::NAN);
    answer
}

pub fn run(case: &Case, device: &Device, way: Way, answer: &Answer, dout: &[bf16]) -> Gradients {
    let attention = case.attention();
    let plan = plan(case, device, way);
    let (width, slots) = (case.width(), case.cu_seqlens.len() - 1);
    let stream: Stream = device.stream().unwrap();
    let qkv = device.upload(&case.qkv).unwrap();
    let mark = vec![bf16::from_bits(MARK); case.tokens * (3 * width + FOREIGN)];
    let dqkv = device.upload(&mark).unwrap();
    let out = device.upload(&answer.out).unwrap();
    let dout = device.upload(dout).unwrap();
    let lse = device.upload(&answer.lse).unwrap();
    let affine = case.affine.each_ref().map(|x| x.as_ref().map(|x| device.upload(x).unwrap()));
    let heads = if case.config.gain_per_head { case.config.heads } else { 1 };
    let before = vec![BEFORE; heads * case.config.head_dim];
    let daffine = [(); 4].map(|()| device.upload(&before).unwrap());
    let accumulate = device.upload(&[i32::from(way.accumulate)]).unwrap();
    let cu_seqlens = device.upload(&case.cu_seqlens).unwrap();
    let longest = way.longest.unwrap_or(case.tokens);
    let schedule = Schedule::new(device, plan.limits, case.tokens, slots).unwrap().with_longest(longest);
    let workspace = device.alloc::<u8>(attention.backward_workspace_bytes(&plan, longest, true)).unwrap();
    let part = |buffer, i: usize| Rows { buffer, offset: i * width, stride: 3 * width + FOREIGN };
    let operands = Backward {
        q: part(&qkv, 0),
        k: part(&qkv, 1),
        v: part(&qkv, 2),
        out: Rows::dense(&out, width),
        lse: &lse,
        dout: Rows::dense(&dout, width),
        affine: affine.each_ref().map(Option::as_ref),
        cu_seqlens: &cu_seqlens,
        schedule: &schedule,
        dq: part(&dqkv, 0),
        dk: part(&dqkv, 1),
        dv: part(&dqkv, 2),
        daffine: daffine.each_ref().map(Some),
        accumulate: Some(&accumulate),
        workspace: &workspace,
    };
    schedule.launch(&stream, &cu_seqlens, Some(&case.cu_seqlens)).unwrap();
    attention.backward(&stream, &plan, &operands).unwrap();
    schedule.check().unwrap();
    let mut rows = [const { Vec::new() }; 3];
    for row in dqkv.download().unwrap().chunks(3 * width + FOREIGN) {
        for (rows, row) in rows.iter_mut().zip(row.chunks(width)) {
            rows.extend_from_slice(row);
        }
        assert!(row[3 * width..].iter().all(|x| x.to_bits() == MARK), "columns of others were written");
    }
    Gradients { rows, affine: daffine.each_ref().map(|x| x.download().unwrap()) }
}

/// Gradients of the used rows, and of gains and biases, on the CPU device.
pub fn expected(case: &Case, answer: &Answer) -> ([Vec<f64>; 3], [Vec<f64>; 4]) {
    let (width, config) = (case.width(), case.config);
    let used = *case.cu_seqlens.last().unwrap() as usize;
    let wide = |x: &[bf16], len: usize| x[..len].iter().map(|x| x.to_f64()).collect::<Vec<_>>();
    let qkv: Vec<f64> = (case.qkv.chunks(3 * width + FOREIGN).take(used))
        .flat_map(|row| row[..3 * width].iter().map(|x| x.to_f64()))
        .collect();
    let affine =
        case.affine.each_ref().map(|x| x.as_ref().map(|x| x.iter().map(|&x| x.into()).collect::<Vec<f64>>()));
    let [q_gain, q_bias, k_gain, k_bias] = affine.each_ref().map(Option::as_deref);
    let heads = if config.gain_per_head { config.heads } else { 1 };
    let mut daffine = [(); 4].map(|()| vec![0.0; heads * config.head_dim]);
    let [dq_gain, dq_bias, dk_gain, dk_bias] = daffine.each_mut().map(|x| Some(x.as_mut_slice()));
    let mut dqkv = vec![f64::NAN; used * 3 * width];
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
        &case.cu_seqlens,
    );
    let mut rows = [const { Vec::new() }; 3];
    for row in dqkv.chunks(width).enumerate() {
        rows[row.0 % 3].extend_from_slice(row.1);
    }
    (rows, daffine)
}

/// Runs, and compares with the CPU device; rows that belong to no image must be zeros.
#[track_caller]
pub fn check(case: &Case, device: &Device, ways: &[Way]) -> Vec<Gradients> {
    let answer = forward(case, device);
    let (rows, affine) = expected(case, &answer);
    let mut all = Vec::new();
    for &way in ways {
        let name = format!("{:?} {:?} short {:?}", case.config, case.cu_seqlens, way.short);
        let got = run(case, device, way, &answer, &dout(case));
        for ((got, want), of) in got.rows.iter().zip(&rows).zip(["dq", "dk", "dv"]) {
            let got: Vec<f64> = got.iter().map(|x| x.to_f64()).collect();
            alike(
                &format!("{of} of {name}"),
                &got,
                want,
                to::ATTENTION_GRAD.metric,
                to::ATTENTION_GRAD.largest,
            );
        }
        for (i, of) in ["dq_gain", "dq_bias", "dk_gain", "dk_bias"].into_iter().enumerate() {
            if case.config.norm == QkNormKind::None {
                assert!(got.affine[i].iter().all(|&x| x == BEFORE), "{of} without a norm");
                continue;
            }
            let before = if way.accumulate { f64::from(BEFORE) } else { 0.0 };
            let sums: Vec<f64> = got.affine[i].iter().map(|&x| f64::from(x) - before).collect();
            // A bias of k cancels in the softmax: its gradient is the rounding of zero.
            if i == 3 {
                let scale = affine[1].iter().fold(1e-30f64, |max, x| max.max(x.abs()));
                let worst = sums.iter().fold(0f64, |max, x| max.max(x.abs())) / scale;
                assert!(worst < 0.1, "{of} of {name}: {worst}");
            } else {
                alike(
                    &format!("{of} of {name}"),
                    &sums,
                    &affine[i],
                    to::ATTENTION_AFFINE_GRAD.metric,
                    to::ATTENTION_AFFINE_GRAD.largest,
                );
            }
        }
        all.push(got);
    }
    all
}
