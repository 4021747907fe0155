//! Contrastive losses of the CPU device against PyTorch, and against plain formulas over the whole matrix of scores.

use trencadis::cpu::contrastive::{
    CHUNK, EPS, Known, Results, Scores, Side, Statistics, Vectors, contrastive, retrieved,
};
use trencadis::cpu::real::Real;
use trencadis::recipe::ContrastiveKind::{self, Sigmoid, Softmax};
use trencadis::weights::Weights;

use crate::support::numbers::{close, random};
use crate::support::places::root;

#[derive(Clone, Debug)]
struct Answer<R> {
    per_pair: Vec<R>,
    dimages: Vec<R>,
    dtexts: Vec<R>,
    dscale: R,
    dbias: R,
}

#[derive(Clone)]
struct Case {
    kind: ContrastiveKind,
    images: Vec<f64>,
    texts: Vec<f64>,
    weights: Vec<f32>,
    scale: f64,
    bias: f64,
    loss_scale: f64,
}

impl Case {
    /// Every third pair has another weight, every fourth none; a slot more than there are pairs.
    fn new(kind: ContrastiveKind, pairs: usize, width: usize) -> Self {
        let images: Vec<f64> = random(pairs * width, 1);
        let noise: Vec<f64> = random(pairs * width, 2);
        let texts = images.iter().zip(noise).map(|(x, noise)| 0.6 * x + 2.0 * noise).collect();
        let weights = (0..=pairs).map(|i| [1.0, 1.0, 0.5, 0.0][i % 4]).collect();
        let bias = if kind == Sigmoid { -1.5 } else { 0.0 };
        Self { kind, images, texts, weights, scale: 2.3, bias, loss_scale: 0.25 }
    }

    fn width(&self) -> usize {
        self.images.len() / (self.weights.len() - 1)
    }

    fn run<R: Real>(&self) -> Answer<R> {
        let narrow = |x: &[f64]| x.iter().map(|x| R::of(*x)).collect::<Vec<R>>();
        let nan = R::of(f64::NAN);
        let mut answer = Answer {
            per_pair: vec![nan; self.weights.len() - 1],
            dimages: vec![nan; self.images.len()],
            dtexts: vec![nan; self.images.len()],
            dscale: nan,
            dbias: if self.kind == Sigmoid { nan } else { R::ZERO },
        };
        let biased = self.kind == Sigmoid;
        let results = Results {
            per_pair: &mut answer.per_pair,
            dimages: &mut answer.dimages,
            dtexts: &mut answer.dtexts,
            dscale: &mut answer.dscale,
            dbias: biased.then_some(&mut answer.dbias),
        };
        let (images, texts) = (narrow(&self.images), narrow(&self.texts));
        let (scale, bias) = (R::of(self.scale), biased.then_some(R::of(self.bias)));
        contrastive(results, &images, &texts, scale, bias, &self.weights, self.kind, self.loss_scale);
        answer
    }

    /// The same from the matrix of all scores.
    fn reference(&self) -> Answer<f64> {
        let (n, d) = (self.weights.len() - 1, self.width());
        let w: Vec<f64> = self.weights.iter().map(|w| f64::from(*w)).collect();
        let unit = |x: &[f64]| -> (Vec<Vec<f64>>, Vec<f64>) {
            let norm = |x: &[f64]| (x.iter().map(|x| x * x).sum::<f64>() + EPS).sqrt();
            let norms: Vec<f64> = x.chunks(d).map(norm).collect();
            (x.chunks(d).zip(&norms).map(|(x, norm)| x.iter().map(|x| x / norm).collect()).collect(), norms)
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let ((x, x_norms), (y, y_norms)) = (unit(&self.images), unit(&self.texts));
        let factor = self.scale.exp();
        let s: Vec<Vec<f64>> =
            x.iter().map(|x| y.iter().map(|y| factor * dot(x, y) + self.bias).collect()).collect();
        let counts = |i: usize, j: usize| w[i] != 0.0 && w[j] != 0.0;
        let rows: Vec<f64> =
            (0..n).map(|i| (0..n).filter(|&j| counts(i, j)).map(|j| s[i][j].exp()).sum()).collect();
        let columns: Vec<f64> =
            (0..n).map(|j| (0..n).filter(|&i| counts(i, j)).map(|i| s[i][j].exp()).sum()).collect();
        let mut answer = Answer {
            per_pair: vec![0.0; n],
            dimages: vec![0.0; n * d],
            dtexts: vec![0.0; n * d],
            dscale: 0.0,
            dbias: 0.0,
        };
        for i in (0..n).filter(|&i| w[i] != 0.0) {
            if self.kind == Softmax {
                answer.per_pair[i] = w[i] * (0.5 * (rows[i].ln() + columns[i].ln()) - s[i][i]);
            }
            for j in (0..n).filter(|&j| w[j] != 0.0) {
                let own = f64::from(u8::from(i == j));
                let ds = match self.kind {
                    Softmax => {
                        let p = s[i][j].exp();
                        0.5 * (w[i] * (p / rows[i] - own) + w[j] * (p / columns[j] - own))
                    }
                    Sigmoid => {
                        let z = 2.0 * own - 1.0;
                        answer.per_pair[i] += w[i] * (-z * s[i][j]).exp().ln_1p();
                        -w[i] * z / (1.0 + (z * s[i][j]).exp())
                    }
                } * self.loss_scale;
                answer.dscale += ds * (s[i][j] - self.bias);
                answer.dbias += ds;
                let angle = dot(&x[i], &y[j]);
                for k in 0..d {
                    answer.dimages[i * d + k] += ds * factor * (y[j][k] - angle * x[i][k]) / x_norms[i];
                    answer.dtexts[j * d + k] += ds * factor * (x[i][k] - angle * y[j][k]) / y_norms[j];
                }
            }
        }
        answer
    }
}

#[track_caller]
fn check<R: Real>(got: &Answer<R>, want: &Answer<f64>, biased: bool, tolerance: f64) {
    close(&got.per_pair, &want.per_pair, tolerance);
    close(&got.dimages, &want.dimages, tolerance);
    close(&got.dtexts, &want.dtexts, tolerance);
    close(&[got.dscale], &[want.dscale], tolerance);
    if biased {
        close(&[got.dbias], &[want.dbias], tolerance);
    }
}

#[test]
fn losses_and_gradients_are_those_of_torch() {
    let goldens = Weights::load(&root().join("tests/contrastive/torch.safetensors")).unwrap().tensors;
    let of = |name: &str| -> Vec<f64> { goldens[name].1.iter().map(|x| f64::from(*x)).collect() };
    for (kind, name) in [(Softmax, "softmax"), (Sigmoid, "sigmoid")] {
        let parameters = of(&format!("{name}.parameters"));
        let mut weights = goldens["weights"].1.clone();
        weights.push(0.0);
        let case = Case {
            kind,
            images: of("images"),
            texts: of("texts"),
            weights,
            scale: parameters[0],
            bias: parameters[1],
            loss_scale: 0.125,
        };
        let part = |part: &str| of(&format!("{name}.{part}"));
        let want = Answer {
            per_pair: part("per_pair"),
            dimages: part("dimages"),
            dtexts: part("dtexts"),
            dscale: part("dscale")[0],
            dbias: part("dbias")[0],
        };
        assert!(want.per_pair.iter().filter(|x| **x == 0.0).count() == 10, "pairs that do not count");
        // The file is rounded to f32.
        check(&case.run::<f64>(), &want, kind == Sigmoid, 1e-7);
        check(&case.run::<f32>(), &want, kind == Sigmoid, 4e-6);
    }
}

#[test]
fn chunks_come_to_what_the_whole_matrix_does() {
    for kind in [Softmax, Sigmoid] {
        for (pairs, width) in [(1, 3), (2, 1), (5, 8), (63, 5), (64, 16), (89, 7), (200, 24)] {
            let case = Case::new(kind, pairs, width);
            let want = case.reference();
            check(&case.run::<f64>(), &want, kind == Sigmoid, 1e-11);
            check(&case.run::<f32>(), &want, kind == Sigmoid, 2e-5);
        }
    }
}

#[test]
fn no_pairs_at_all() {
    for kind in [Softmax, Sigmoid] {
        let mut case = Case::new(kind, 6, 4);
        case.weights.fill(0.0);
        let answer = case.run::<f32>();
        assert!(answer.per_pair.iter().chain(&answer.dimages).chain(&answer.dtexts).all(|x| *x == 0.0));
        assert_eq!((answer.dscale, answer.dbias), (0.0, 0.0));
        let (images, texts) = ([0f32; 0], [0f32; 0]);
        let (mut dscale, mut none) = (f32::NAN, []);
        let results = Results {
            per_pair: &mut [],
            dimages: &mut none,
            dtexts: &mut [],
            dscale: &mut dscale,
            dbias: None,
        };
        contrastive(results, &images, &texts, 1.0, None, &[], kind, 1.0);
        assert_eq!(dscale, 0.0);
    }
}

/// What does not count leaves no trace, whatever its vectors are.
#[test]
fn pairs_of_weight_0_are_not_compared() {
    for kind in [Softmax, Sigmoid] {
        let case = Case::new(kind, 90, 8);
        let mut odd = case.clone();
        for i in (0..90).filter(|i| case.weights[*i] == 0.0) {
            odd.images[i * 8] = f64::NAN;
            odd.texts[i * 8] = f64::INFINITY;
        }
        let (a, b) = (case.run::<f32>(), odd.run::<f32>());
        assert_eq!((a.per_pair, a.dimages, a.dtexts), (b.per_pair, b.dimages, b.dtexts));
        assert_eq!((a.dscale, a.dbias), (b.dscale, b.dbias));
    }
}

#[test]
fn vectors_that_are_no_numbers_show() {
    for kind in [Softmax, Sigmoid] {
        let mut case = Case::new(kind, 5, 4);
        case.texts[4] = f64::NAN;
        let answer = case.run::<f32>();
        assert!(answer.per_pair[0].is_nan() && answer.dscale.is_nan());
    }
}

/// Far scores: e^100 is no f32, and a vector of zeros has no direction.
#[test]
fn extreme_scores_are_finite() {
    for kind in [Softmax, Sigmoid] {
        let mut case = Case::new(kind, 70, 6);
        case.scale = 100f64.ln();
        case.images[..6].fill(0.0);
        let (got, want) = (case.run::<f32>(), case.run::<f64>());
        close(&got.per_pair, &want.per_pair, 2e-5);
        assert!(got.dimages.iter().chain(&got.dtexts).all(|x| x.is_finite()));
    }
}

/// As ranks would that have a part of the pairs each: the texts of others come in chunks.
#[test]
fn texts_may_come_in_parts() {
    let (pairs, width) = (150, 8);
    let unit = |seed| -> Vec<f64> {
        let x: Vec<f64> = random(pairs * width, seed);
        x.chunks(width)
            .flat_map(|x| {
                let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
                x.iter().map(|x| x / norm).collect::<Vec<_>>()
            })
            .collect()
    };
    let (images, texts) = (unit(1), unit(2));
    let part =
        |unit: &'_ [f64], from: usize, to: usize| -> Vec<f64> { unit[from * width..to * width].to_vec() };
    for kind in [Softmax, Sigmoid] {
        let scores = Scores { kind, factor: 9.0, bias: -0.5 };
        let weights: Vec<f64> = (0..pairs).map(|i| 1.0 + (i % 3) as f64).collect();
        let log_sums: Vec<f64> = random(pairs, 3);
        // All at once, and images 40 to 110 against texts in three parts.
        let run = |from: usize, to: usize, cuts: &[usize]| {
            let own = part(&images, from, to);
            let own = Vectors { unit: &own, width, first: from };
            let own_known = Known { log_sums: &log_sums[from..to], weights: &weights[from..to] };
            let mut statistics = vec![Statistics::new(); to - from];
            let (mut dunit, mut sums) = (vec![0.0; (to - from) * width], vec![[0.0; 2]; to - from]);
            for cut in cuts.windows(2) {
                let others = part(&texts, cut[0], cut[1]);
                let others = Vectors { unit: &others, width, first: cut[0] };
                let range = cut[0]..cut[1];
                let known = Known { log_sums: &log_sums[range.clone()], weights: &weights[range] };
                scores.statistics(&mut statistics, own, others);
                scores.gradient(Side::Images, &mut dunit, &mut sums, (own, own_known), (others, known));
            }
            let of_rows: Vec<f64> = statistics
                .iter()
                .flat_map(|s| [s.pair, if kind == Softmax { s.log_sum() } else { s.loss }])
                .collect();
            (of_rows, dunit, sums.concat())
        };
        let (statistics, dunit, sums) = run(0, pairs, &[0, pairs]);
        let (of_part, dunit_of_part, sums_of_part) = run(40, 110, &[0, 30, 95, pairs]);
        close(&of_part, &statistics[80..220], 1e-12);
        close(&dunit_of_part, &dunit[40 * width..110 * width], 1e-12);
        close(&sums_of_part, &sums[80..220], 1e-12);
    }
}

#[test]
fn ranks_count_the_texts_that_are_ahead() {
    // Texts at these angles, images at 0.
    let at = |degrees: f64| [degrees.to_radians().cos(), degrees.to_radians().sin()];
    let texts: Vec<f64> = [10.0, 30.0, 20.0, 30.0, 0.0, 170.0].into_iter().flat_map(at).collect();
    let images: Vec<f64> = (0..6).flat_map(|i| [1.0 + f64::from(i), 0.0]).collect();
    // The fifth text would be ahead of all, but does not count.
    let weights = [1.0, 1.0, 0.5, 1.0, 0.0, 1.0, 0.0];
    assert_eq!(retrieved(&images, &texts, &weights, 2), [0, 2, 1, 3, -1, 4]);
    let mut broken = texts.clone();
    broken[0] = f64::NAN;
    assert_eq!(retrieved(&images, &broken, &weights, 2), [i32::MAX, 2, 1, 3, -1, 4]);
    assert!(retrieved::<f32>(&[], &[], &[], 2).is_empty());

    // Across chunks.
    let case = Case::new(Softmax, 3 * CHUNK + 5, 12);
    let dot = |i: usize, j: usize| {
        let (x, y) = (&case.images[i * 12..][..12], &case.texts[j * 12..][..12]);
        let norm = y.iter().map(|y| y * y).sum::<f64>().sqrt();
        x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>() / norm
    };
    let want: Vec<i32> = (0..3 * CHUNK + 5)
        .map(|i| match case.weights[i] {
            0.0 => -1,
            _ => {
                (0..3 * CHUNK + 5).filter(|&j| case.weights[j] != 0.0 && dot(i, j) > dot(i, i)).count() as i32
            }
        })
        .collect();
    assert_eq!(retrieved(&case.images, &case.texts, &case.weights, 12), want);
}
