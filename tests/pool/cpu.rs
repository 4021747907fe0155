//! Pooling against naive references and finite differences, and its independence of packing and threads.

use trencadis::cpu::attention::{AttentionConfig, QkAffine, QkAffineGrad, forward};
use trencadis::cpu::pool::{
    attention_backward, attention_forward, gather, gather_grad, mean_backward, mean_forward, probabilities,
};
use trencadis::cpu::real::Real;
use trencadis::recipe::{QkNormKind, Rope};
use trencadis::rng::{Purpose, Stream};

const HEADS: usize = 3;
const DIM: usize = 5;
const WIDTH: usize = HEADS * DIM;
const KINDS: [QkNormKind; 4] =
    [QkNormKind::None, QkNormKind::Rms, QkNormKind::LayerNorm, QkNormKind::LayerNormBias];
/// With one or two prefix tokens the first and third image have nothing to pool.
const LENGTHS: [usize; 6] = [1, 7, 0, 13, 130, 3];

#[derive(Clone)]
struct Case<R> {
    config: AttentionConfig,
    cu_seqlens: Vec<i32>,
    skip: usize,
    q: Vec<R>,
    kv: Vec<R>,
    dout: Vec<R>,
    /// γq, γk, βq, βk.
    affine: [Option<Vec<R>>; 4],
}

#[derive(Debug, PartialEq)]
struct Answer<R> {
    out: Vec<R>,
    lse: Vec<R>,
    dq: Vec<R>,
    dkv: Vec<R>,
    daffine: [Option<Vec<R>>; 4],
}

fn values(seed: u64, n: usize, offset: f64) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
    (0..n).map(|_| f64::from(stream.uniform()) * 2.0 - 1.0 + offset).collect()
}

fn starts(lengths: &[usize]) -> Vec<i32> {
    let mut cu_seqlens = vec![0];
    for length in lengths {
        cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + *length as i32);
    }
    cu_seqlens
}

fn case(norm: QkNormKind, gain_per_head: bool, present: bool, lengths: &[usize], skip: usize) -> Case<f64> {
    let tokens: usize = lengths.iter().sum();
    let len = if gain_per_head { WIDTH } else { DIM };
    let affine = |i: usize| present.then(|| values(10 + i as u64, len, if i < 2 { 1.2 } else { 0.1 }));
    Case {
        config: AttentionConfig {
            heads: HEADS,
            kv_heads: HEADS,
            head_dim: DIM,
            scale: 0.7,
            norm,
            eps: 1e-3,
            gain_per_head,
            rope: Rope::None,
        },
        cu_seqlens: starts(lengths),
        skip,
        q: values(1, WIDTH, 0.1),
        kv: values(2, tokens * 2 * WIDTH, 0.3),
        dout: values(3, lengths.len() * WIDTH, 0.0),
        affine: [affine(0), affine(1), affine(2), affine(3)],
    }
}

impl<R: Real> Case<R> {
    fn affine(&self) -> QkAffine<'_, R> {
        let [q_gain, k_gain, q_bias, k_bias] = self.affine.each_ref().map(Option::as_deref);
        QkAffine { q_gain, k_gain, q_bias, k_bias }
    }

    fn forward(&self) -> (Vec<R>, Vec<R>) {
        let mut out = vec![R::of(f64::NAN); self.dout.len()];
        let mut lse = vec![R::of(f64::NAN); self.dout.len() / DIM];
        let Self { config, q, kv, cu_seqlens, skip, .. } = self;
        attention_forward(config, &mut out, &mut lse, q, kv, self.affine(), cu_seqlens, *skip);
        (out, lse)
    }

    fn run(&self) -> Answer<R> {
        let (out, lse) = self.forward();
        let nan = |x: &[R]| vec![R::of(f64::NAN); x.len()];
        let (mut dq, mut dkv) = (nan(&self.q), nan(&self.kv));
        let mut daffine = self.affine.clone().map(|x| x.map(|x| vec![R::ONE; x.len()]));
        let [q_gain, k_gain, q_bias, k_bias] = daffine.each_mut().map(Option::as_deref_mut);
        attention_backward(
            &self.config,
            &mut dq,
            &mut dkv,
            QkAffineGrad { q_gain, k_gain, q_bias, k_bias },
            &self.dout,
            &out,
            &lse,
            &self.q,
            &self.kv,
            self.affine(),
            &self.cu_seqlens,
            self.skip,
        );
        for x in daffine.iter_mut().flatten().flatten() {
            *x -= R::ONE;
        }
        Answer { out, lse, dq, dkv, daffine }
    }

    fn loss(&self) -> f64 {
        self.forward().0.iter().zip(&self.dout).map(|(a, b)| a.f64() * b.f64()).sum()
    }
}

impl Case<f64> {
    fn f32(&self) -> Case<f32> {
        let narrow = |x: &Vec<f64>| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
        Case {
            config: self.config,
            cu_seqlens: self.cu_seqlens.clone(),
            skip: self.skip,
            q: narrow(&self.q),
            kv: narrow(&self.kv),
            dout: narrow(&self.dout),
            affine: self.affine.each_ref().map(|x| x.as_ref().map(narrow)),
        }
    }
}

fn assert_close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance, "{name}[{i}]: {got} instead of {want}");
    }
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Self-attention, tested elsewhere, is the reference: every pooled token asks with the one query.
#[test]
fn attention_pooling_is_attention_of_the_query() {
    for kind in KINDS {
        for (per_head, skip) in [(false, 0), (true, 1), (true, 2)] {
            let case = case(kind, per_head, true, &LENGTHS, skip);
            let (out, lse) = case.forward();
            let (single, single_lse) = case.f32().forward();
            for (image, range) in case.cu_seqlens.windows(2).enumerate() {
                let (got, got_lse) = (&out[image * WIDTH..][..WIDTH], &lse[image * HEADS..][..HEADS]);
                let tokens = range[0] as usize + skip..range[1] as usize;
                if tokens.is_empty() {
                    assert_eq!(got, [0.0; WIDTH]);
                    assert_eq!(got_lse, [0.0; HEADS]);
                    continue;
                }
                let mut qkv = Vec::new();
                for token in tokens.clone() {
                    qkv.extend(&case.q);
                    qkv.extend(&case.kv[token * 2 * WIDTH..][..2 * WIDTH]);
                }
                let mut want = vec![0.0; tokens.len() * WIDTH];
                let mut want_lse = vec![0.0; tokens.len() * HEADS];
                let ends = [0, tokens.len() as i32];
                forward(&case.config, &mut want, &mut want_lse, &qkv, case.affine(), None, &ends);
                assert_close("out", got, &want[..WIDTH], 1e-12);
                assert_close("lse", got_lse, &want_lse[..HEADS], 1e-12);
                assert_close("f32 out", &widen(&single[image * WIDTH..][..WIDTH]), got, 5e-6);
                assert_close("f32 lse", &widen(&single_lse[image * HEADS..][..HEADS]), got_lse, 5e-6);
            }
        }
    }
}

#[test]
fn attention_pooling_gradients() {
    const STEP: f64 = 1e-5;
    for kind in KINDS {
        for (per_head, present, skip) in [(false, true, 0), (true, true, 1), (true, false, 2)] {
            let case = case(kind, per_head, present, &LENGTHS, skip);
            let answer = case.run();
            let check = |name: &str, got: f64, change: &dyn Fn(&mut Case<f64>, f64)| {
                let at = |step| {
                    let mut moved = case.clone();
                    change(&mut moved, step);
                    moved.loss()
                };
                let want = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                assert!((got - want).abs() <= 1e-7 * (1.0 + want.abs()), "{name}: {got} instead of {want}");
            };
            for (i, &got) in answer.dq.iter().enumerate() {
                check(&format!("dq[{i}]"), got, &|case, step| case.q[i] += step);
            }
            assert!(answer.dkv.iter().all(|x| x.is_finite()), "every row of dkv is written");
            for i in (0..600).step_by(7).chain((600..case.kv.len()).step_by(41)) {
                check(&format!("dkv[{i}]"), answer.dkv[i], &|case, step| case.kv[i] += step);
            }
            for (part, grad) in answer.daffine.iter().enumerate() {
                for (i, &got) in grad.iter().flatten().enumerate() {
                    check(&format!("daffine[{part}][{i}]"), got, &|case, step| {
                        case.affine[part].as_mut().unwrap()[i] += step;
                    });
                }
            }
        }
    }
}

#[test]
fn packing_changes_no_bit() {
    let packed = case(QkNormKind::Rms, true, true, &LENGTHS, 1).f32();
    let all = packed.run();
    for (image, range) in packed.cu_seqlens.windows(2).enumerate() {
        let kv = range[0] as usize * 2 * WIDTH..range[1] as usize * 2 * WIDTH;
        let alone = Case {
            cu_seqlens: vec![0, range[1] - range[0]],
            kv: packed.kv[kv.clone()].to_vec(),
            dout: packed.dout[image * WIDTH..][..WIDTH].to_vec(),
            ..packed.clone()
        }
        .run();
        assert_eq!(alone.out, all.out[image * WIDTH..][..WIDTH], "image {image}");
        assert_eq!(alone.lse, all.lse[image * HEADS..][..HEADS], "image {image}");
        assert_eq!(alone.dkv, all.dkv[kv], "image {image}");
    }
}

#[test]
fn thread_count_changes_no_bit() {
    let case = case(QkNormKind::LayerNormBias, false, true, &LENGTHS, 1).f32();
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.run())
    };
    assert_eq!(on(1), on(3));
}

#[test]
fn mean_pooling_and_its_gradient() {
    let cu_seqlens = starts(&[3, 0, 1, 2]);
    let x: Vec<f64> = (0..12).map(|i| f64::from(i * i)).collect();
    let mut out = [f64::NAN; 8];
    mean_forward(&mut out, &x, &cu_seqlens, 1, 2);
    assert_eq!(out, [10.0, 17.0, 0.0, 0.0, 0.0, 0.0, 100.0, 121.0]);
    mean_forward(&mut out, &x, &cu_seqlens, 0, 2);
    assert_close("mean", &out, &[20.0 / 3.0, 35.0 / 3.0, 0.0, 0.0, 36.0, 49.0, 82.0, 101.0], 1e-13);

    let dout = [2.0, 4.0, 100.0, 100.0, 6.0, 8.0, 1.0, 3.0];
    let mut dx = [f64::NAN; 12];
    mean_backward(&mut dx, &dout, &cu_seqlens, 1, 2);
    assert_eq!(dx, [0.0, 0.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 1.0, 3.0]);
}

#[test]
fn gather_and_its_gradient() {
    let x: Vec<f32> = (0..10).map(|i| i as f32).collect();
    let mut out = [f32::NAN; 6];
    gather(&mut out, &x, &[4, 0, 4], 2);
    assert_eq!(out, [8.0, 9.0, 0.0, 1.0, 8.0, 9.0]);
    let mut dx = [f32::NAN; 10];
    gather_grad(&mut dx, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[4, 0, 4], 2);
    assert_eq!(dx, [3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 6.0, 8.0]);
}

/// The probabilities are those with which the forward pass sums v, and the largest score is that of its log-sum-exp.
#[test]
fn probabilities_are_those_of_the_forward_pass() {
    for kind in KINDS {
        let case = case(kind, true, kind != QkNormKind::None, &LENGTHS, 2);
        let (out, lse) = case.forward();
        for (slot, pair) in case.cu_seqlens.windows(2).enumerate() {
            let (start, end) = (pair[0] as usize, pair[1] as usize);
            let image = end.min(start + case.skip)..end;
            if image.is_empty() {
                continue;
            }
            let mut head = 0;
            let take = |p: &[f64], max: f64| {
                assert!(p.len() == image.len() && (p.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                let largest = p.iter().copied().fold(0.0, f64::max);
                assert!((largest.ln() + lse[slot * HEADS + head] - max).abs() < 1e-10);
                for column in head * DIM..(head + 1) * DIM {
                    let v = |token: usize| case.kv[token * 2 * WIDTH + WIDTH + column];
                    let sum: f64 = p.iter().zip(image.clone()).map(|(p, token)| p * v(token)).sum();
                    assert!((sum - out[slot * WIDTH + column]).abs() < 1e-12, "{kind:?}");
                }
                head += 1;
            };
            probabilities(&case.config, &case.q, &case.kv, case.affine(), image.clone(), take);
            assert_eq!(head, HEADS);
        }
    }
}
