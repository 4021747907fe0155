//! Packed attention against a naive reference and finite differences, and its independence of
//! packing and threads.

use trencadis::cpu::attention::{AttentionConfig, QkAffine, QkAffineGrad, backward, forward, probabilities};
use trencadis::cpu::real::Real;
use trencadis::recipe::{QkNormKind, Rope};
use trencadis::rng::{Purpose, Stream};

const KINDS: [QkNormKind; 4] =
    [QkNormKind::None, QkNormKind::Rms, QkNormKind::LayerNorm, QkNormKind::LayerNormBias];
const ROPES: [Rope; 3] = [Rope::None, Rope::Interleaved, Rope::Halves];
const SHORT: [usize; 5] = [1, 7, 0, 13, 130];

/// Operands of one call; affine in the order γq, γk, βq, βk.
#[derive(Clone)]
struct Case<R> {
    config: AttentionConfig,
    cu_seqlens: Vec<i32>,
    qkv: Vec<R>,
    dout: Vec<R>,
    affine: [Option<Vec<R>>; 4],
    /// Cos and sin of each token and pair.
    rope: Option<Vec<R>>,
}

#[derive(Debug, PartialEq)]
struct Answer<R> {
    out: Vec<R>,
    lse: Vec<R>,
    dqkv: Vec<R>,
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

fn case(kind: QkNormKind, gain_per_head: bool, present: [bool; 4], lengths: &[usize]) -> Case<f64> {
    let (heads, head_dim) = (3, 5);
    case_of(
        AttentionConfig {
            heads,
            kv_heads: heads,
            head_dim,
            scale: 0.7,
            norm: kind,
            eps: 1e-3,
            gain_per_head,
            rope: Rope::None,
        },
        present,
        lengths,
    )
}

/// Six query heads that share kv heads in twos or all, turned or not.
fn grouped_case(kind: QkNormKind, kv_heads: usize, rope: Rope, lengths: &[usize]) -> Case<f64> {
    let config = AttentionConfig {
        heads: 6,
        kv_heads,
        head_dim: 6,
        scale: 0.5,
        norm: kind,
        eps: 1e-3,
        gain_per_head: kv_heads > 1,
        rope,
    };
    case_of(config, [kind != QkNormKind::None; 4], lengths)
}

fn case_of(config: AttentionConfig, present: [bool; 4], lengths: &[usize]) -> Case<f64> {
    let AttentionConfig { heads, kv_heads, head_dim, gain_per_head, rope, .. } = config;
    let tokens: usize = lengths.iter().sum();
    let affine = |i: usize| {
        let heads = if gain_per_head { [heads, kv_heads][i % 2] } else { 1 };
        present[i].then(|| values(10 + i as u64, heads * head_dim, if i < 2 { 1.2 } else { 0.1 }))
    };
    let angles = values(3, tokens * head_dim / 2, 0.0);
    Case {
        config,
        cu_seqlens: starts(lengths),
        qkv: values(1, tokens * config.qkv_width(), 0.3),
        dout: values(2, tokens * heads * head_dim, 0.0),
        affine: [affine(0), affine(1), affine(2), affine(3)],
        rope: (rope != Rope::None)
            .then(|| angles.iter().flat_map(|a| [(3.0 * a).cos(), (3.0 * a).sin()]).collect()),
    }
}

impl<R: Real> Case<R> {
    fn affine(&self) -> QkAffine<'_, R> {
        let [q_gain, k_gain, q_bias, k_bias] = self.affine.each_ref().map(Option::as_deref);
        QkAffine { q_gain, k_gain, q_bias, k_bias }
    }

    fn forward(&self) -> (Vec<R>, Vec<R>) {
        // NaN must not survive: results are written, not added to.
        let mut out = vec![R::of(f64::NAN); self.dout.len()];
        let mut lse = vec![R::of(f64::NAN); self.dout.len() / self.config.head_dim];
        let rope = self.rope.as_deref();
        forward(&self.config, &mut out, &mut lse, &self.qkv, self.affine(), rope, &self.cu_seqlens);
        (out, lse)
    }

    fn run(&self) -> Answer<R> {
        let (out, lse) = self.forward();
        let mut dqkv = vec![R::of(f64::NAN); self.qkv.len()];
        // Gradients of the gains are added to what is there.
        let mut daffine = self.affine.clone().map(|x| x.map(|x| vec![R::ONE; x.len()]));
        let [q_gain, k_gain, q_bias, k_bias] = daffine.each_mut().map(Option::as_deref_mut);
        backward(
            &self.config,
            &mut dqkv,
            QkAffineGrad { q_gain, k_gain, q_bias, k_bias },
            &self.dout,
            &out,
            &lse,
            &self.qkv,
            self.affine(),
            self.rope.as_deref(),
            &self.cu_seqlens,
        );
        for x in daffine.iter_mut().flatten().flatten() {
            *x -= R::ONE;
        }
        Answer { out, lse, dqkv, daffine }
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
            qkv: narrow(&self.qkv),
            dout: narrow(&self.dout),
            affine: self.affine.each_ref().map(|x| x.as_ref().map(narrow)),
            rope: self.rope.as_ref().map(narrow),
        }
    }

    /// Of one query head, q (part 0) or k (part 1) as they meet, or plain v (part 2).
    fn row(&self, token: usize, part: usize, head: usize) -> Vec<f64> {
        let AttentionConfig { heads, kv_heads, head_dim, .. } = self.config;
        let head = if part == 0 { head } else { head * kv_heads / heads };
        let first = [0, heads, heads + kv_heads][part];
        let start = (token * (heads + 2 * kv_heads) + first + head) * head_dim;
        let x = &self.qkv[start..start + head_dim];
        if part == 2 { x.to_vec() } else { self.turned(token, self.normalised(x, part, head)) }
    }

    fn turned(&self, token: usize, x: Vec<f64>) -> Vec<f64> {
        let Some(rope) = &self.rope else { return x };
        let dim = x.len();
        let mut y = vec![0.0; dim];
        for pair in 0..dim / 2 {
            let (i, j) = match self.config.rope {
                Rope::Halves => (pair, pair + dim / 2),
                _ => (2 * pair, 2 * pair + 1),
            };
            let [cos, sin] = [0, 1].map(|part| rope[token * dim + 2 * pair + part]);
            (y[i], y[j]) = (x[i] * cos - x[j] * sin, x[j] * cos + x[i] * sin);
        }
        y
    }

    fn normalised(&self, x: &[f64], part: usize, head: usize) -> Vec<f64> {
        let AttentionConfig { head_dim, norm, eps, gain_per_head, .. } = self.config;
        let mut x = x.to_vec();
        if norm == QkNormKind::None {
            return x;
        }
        let count = head_dim as f64;
        if norm != QkNormKind::Rms {
            let mean = x.iter().sum::<f64>() / count;
            x.iter_mut().for_each(|x| *x -= mean);
        }
        let rms = (x.iter().map(|x| x * x).sum::<f64>() / count + eps).sqrt();
        for (i, x) in x.iter_mut().enumerate() {
            let at = if gain_per_head { head * head_dim + i } else { i };
            *x = *x / rms * self.affine[part].as_ref().map_or(1.0, |gain| gain[at])
                + self.affine[2 + part].as_ref().map_or(0.0, |bias| bias[at]);
        }
        x
    }

    fn naive(&self) -> (Vec<f64>, Vec<f64>) {
        let AttentionConfig { heads, head_dim, scale, .. } = self.config;
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for image in self.cu_seqlens.windows(2) {
            for token in image[0] as usize..image[1] as usize {
                for head in 0..heads {
                    let q = self.row(token, 0, head);
                    let keys = image[0] as usize..image[1] as usize;
                    let dot = |k: Vec<f64>| q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>();
                    let p: Vec<f64> =
                        keys.clone().map(|key| (scale * dot(self.row(key, 1, head))).exp()).collect();
                    let sum: f64 = p.iter().sum();
                    let mut result = vec![0.0; head_dim];
                    for (key, p) in keys.zip(p) {
                        for (result, v) in result.iter_mut().zip(self.row(key, 2, head)) {
                            *result += p / sum * v;
                        }
                    }
                    out.extend(result);
                    lse.push(sum.ln());
                }
            }
        }
        (out, lse)
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

/// Central differences of the loss at every `stride`-th qkv and every gain and bias.
fn check_gradients(case: &Case<f64>, stride: usize) {
    const STEP: f64 = 1e-5;
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
    assert!(answer.dqkv.iter().all(|x| x.is_finite()), "every row of dqkv is written");
    for i in (0..case.qkv.len()).step_by(stride) {
        check(&format!("dqkv[{i}]"), answer.dqkv[i], &|case, step| case.qkv[i] += step);
    }
    for (kind, grad) in answer.daffine.iter().enumerate() {
        for (i, &got) in grad.iter().flatten().enumerate() {
            check(&format!("daffine[{kind}][{i}]"), got, &|case, step| {
                case.affine[kind].as_mut().unwrap()[i] += step;
            });
        }
    }
}

fn check_forward(case: &Case<f64>) {
    let (want_out, want_lse) = case.naive();
    let (out, lse) = case.forward();
    assert_close("out", &out, &want_out, 1e-12);
    assert_close("lse", &lse, &want_lse, 1e-12);
    let (out, lse) = case.f32().forward();
    assert_close("f32 out", &widen(&out), &want_out, 5e-6);
    assert_close("f32 lse", &widen(&lse), &want_lse, 5e-6);
}

#[test]
fn forward_is_softmax_attention_within_each_image() {
    for kind in KINDS {
        for per_head in [false, true] {
            check_forward(&case(kind, per_head, [true; 4], &SHORT));
        }
    }
}

#[test]
fn forward_with_groups_and_rotations() {
    for kind in KINDS {
        for (kv_heads, rope) in [1, 3, 6].into_iter().flat_map(|n| ROPES.map(|rope| (n, rope))) {
            check_forward(&grouped_case(kind, kv_heads, rope, &SHORT));
        }
    }
}

#[test]
fn gradients_with_groups_and_rotations() {
    for kind in KINDS {
        for (kv_heads, rope) in [1, 3, 6].into_iter().flat_map(|n| ROPES.map(|rope| (n, rope))) {
            check_gradients(&grouped_case(kind, kv_heads, rope, &[1, 3, 0, 5]), 1);
        }
    }
    check_gradients(&grouped_case(QkNormKind::Rms, 3, Rope::Halves, &[2, 600]), 1601);
}

/// Query heads that share a kv head are as heads that each have a copy of it.
#[test]
fn shared_heads_are_as_copies() {
    let shared = grouped_case(QkNormKind::None, 2, Rope::Halves, &SHORT);
    let dim = shared.config.head_dim;
    let mut copies =
        Case { config: AttentionConfig { kv_heads: 6, ..shared.config }, qkv: Vec::new(), ..shared.clone() };
    for row in shared.qkv.chunks(10 * dim) {
        copies.qkv.extend(&row[..6 * dim]);
        for head in [6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9] {
            copies.qkv.extend(&row[head * dim..][..dim]);
        }
    }
    let (got, want) = (shared.run(), copies.run());
    assert_eq!((got.out, got.lse), (want.out, want.lse));
    let mut dqkv = Vec::new();
    for row in want.dqkv.chunks(18 * dim) {
        dqkv.extend(&row[..6 * dim]);
        for copies in row[6 * dim..].chunks(3 * dim) {
            dqkv.extend((0..dim).map(|i| copies[i] + copies[dim + i] + copies[2 * dim + i]));
        }
    }
    assert_close("dqkv", &got.dqkv, &dqkv, 1e-12);
}

#[test]
fn forward_of_a_long_image() {
    let case = case(QkNormKind::Rms, true, [true; 4], &[3, 700]);
    let (want_out, want_lse) = case.naive();
    let (out, lse) = case.forward();
    assert_close("out", &out, &want_out, 1e-12);
    assert_close("lse", &lse, &want_lse, 1e-12);
}

#[test]
fn gradients_of_every_norm() {
    for kind in KINDS {
        for per_head in [false, true] {
            check_gradients(&case(kind, per_head, [kind != QkNormKind::None; 4], &SHORT), 97);
        }
    }
}

#[test]
fn gradients_of_every_token_of_short_images() {
    check_gradients(&case(QkNormKind::LayerNormBias, true, [true; 4], &[1, 3, 0, 5]), 1);
}

#[test]
fn gradients_with_some_affine_parts_absent() {
    for present in [[false; 4], [true, false, false, false], [false, true, true, false]] {
        check_gradients(&case(QkNormKind::LayerNormBias, true, present, &[7, 1]), 7);
        check_gradients(&case(QkNormKind::Rms, false, present, &[7, 1]), 7);
    }
}

#[test]
fn gradients_of_a_long_image() {
    check_gradients(&case(QkNormKind::LayerNormBias, false, [true; 4], &[2, 600]), 1601);
}

#[test]
fn single_precision_gradients_follow_double() {
    let case = case(QkNormKind::Rms, true, [true, true, false, false], &[70, 600, 130]);
    let (want, got) = (case.run(), case.f32().run());
    assert_close("dqkv", &widen(&got.dqkv), &want.dqkv, 2e-5);
    for (got, want) in got.daffine.iter().zip(&want.daffine) {
        if let (Some(got), Some(want)) = (got, want) {
            assert_close("daffine", &widen(got), want, 5e-4);
        }
    }
}

/// Without a norm, gains and biases are ignored and their gradients are left alone.
#[test]
fn without_a_norm_affine_is_ignored() {
    let with = case(QkNormKind::None, true, [true; 4], &SHORT).run();
    let without = case(QkNormKind::None, true, [false; 4], &SHORT).run();
    assert_eq!((with.out, with.dqkv), (without.out, without.dqkv));
    assert!(with.daffine.iter().flatten().flatten().all(|&x| x == 0.0));
}

/// Large scores neither overflow nor lose the largest.
#[test]
fn large_scores_are_stable() {
    let mut case = case(QkNormKind::None, true, [false; 4], &[40]).f32();
    case.qkv.iter_mut().for_each(|x| *x *= 100.0);
    let answer = case.run();
    assert!(answer.out.iter().chain(&answer.lse).chain(&answer.dqkv).all(|x| x.is_finite()));
}

/// An image has the same bits alone and in any company, forward and backward.
#[test]
fn packing_changes_no_bit() {
    let lengths = [1, 7, 0, 600, 13, 130, 700];
    let plain = KINDS.map(|kind| case(kind, true, [true, true, false, false], &lengths));
    let turned = ROPES.map(|rope| grouped_case(QkNormKind::Rms, 3, rope, &lengths));
    for packed in plain.into_iter().chain(turned).map(|case| case.f32()) {
        let AttentionConfig { heads, head_dim, .. } = packed.config;
        let (inner, width) = (heads * head_dim, packed.config.qkv_width());
        let all = packed.run();
        for (image, range) in packed.cu_seqlens.windows(2).enumerate() {
            let rows = range[0] as usize..range[1] as usize;
            let cut = |x: &[f32], width: usize| x[rows.start * width..rows.end * width].to_vec();
            let alone = Case {
                cu_seqlens: vec![0, rows.len() as i32],
                qkv: cut(&packed.qkv, width),
                dout: cut(&packed.dout, inner),
                rope: packed.rope.as_ref().map(|rope| cut(rope, head_dim)),
                ..packed.clone()
            }
            .run();
            assert_eq!(alone.out, cut(&all.out, inner), "image {image}");
            assert_eq!(alone.lse, cut(&all.lse, heads), "image {image}");
            assert_eq!(alone.dqkv, cut(&all.dqkv, width), "image {image}");
        }
    }
}

#[test]
fn thread_count_changes_no_bit() {
    let lengths = [1, 7, 0, 600, 13, 130, 40];
    let plain = case(QkNormKind::LayerNormBias, false, [true; 4], &lengths);
    for case in [plain, grouped_case(QkNormKind::LayerNormBias, 3, Rope::Interleaved, &lengths)] {
        let case = case.f32();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| case.run())
        };
        assert_eq!(on(1), on(3));
    }
}

#[test]
fn no_images_is_no_work() {
    let case = case(QkNormKind::Rms, true, [true; 4], &[0, 0]);
    assert!(case.run().daffine.iter().flatten().flatten().all(|&x| x == 0.0));
}

/// The probabilities are those with which the forward pass sums v, and the largest score is that of its log-sum-exp.
#[test]
fn probabilities_are_those_of_the_forward_pass() {
    for rope in ROPES {
        for kind in KINDS {
            let case = grouped_case(kind, 3, rope, &SHORT);
            let AttentionConfig { heads, head_dim, .. } = case.config;
            let (out, lse) = case.forward();
            let mut rows = 0;
            for image in case.cu_seqlens.windows(2).map(|pair| pair[0] as usize..pair[1] as usize) {
                for head in 0..heads {
                    let mut query = image.start;
                    let rope = case.rope.as_deref();
                    let take = |p: &[f64], max: f64| {
                        assert_eq!(p.len(), image.len());
                        assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                        let largest = p.iter().copied().fold(0.0, f64::max);
                        assert!((largest.ln() + lse[query * heads + head] - max).abs() < 1e-10);
                        for column in 0..head_dim {
                            let v = |token: usize| {
                                let first =
                                    (heads + case.config.kv_heads + head / case.config.group()) * head_dim;
                                case.qkv[token * case.config.qkv_width() + first + column]
                            };
                            let sum: f64 = p.iter().zip(image.clone()).map(|(p, token)| p * v(token)).sum();
                            let want = out[(query * heads + head) * head_dim + column];
                            assert!((sum - want).abs() < 1e-12, "{kind:?} {rope:?}: {sum} instead of {want}");
                        }
                        (query, rows) = (query + 1, rows + 1);
                    };
                    let queries = image.clone();
                    probabilities(
                        &case.config,
                        &case.qkv,
                        case.affine(),
                        rope,
                        image.clone(),
                        head,
                        queries,
                        take,
                    );
                }
            }
            assert_eq!(rows, SHORT.iter().sum::<usize>() * heads);
        }
    }
}
