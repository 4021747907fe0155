//! LayerNorm and RMSNorm of the CPU device against plain f64 formulas and finite differences.

use trencadis::cpu::{norm, real::Real};
use trencadis::recipe::NormKind;

use crate::support::numbers::{close, random};

const EPS: f64 = 1e-6;

fn wide<R: Real>(x: &[R]) -> Vec<f64> {
    x.iter().map(|x| x.f64()).collect()
}

/// (y, stats) of rows of `width`.
fn reference(
    x: &[f64],
    gain: Option<&[f64]>,
    bias: Option<&[f64]>,
    width: usize,
    kind: NormKind,
) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut stats) = (Vec::new(), Vec::new());
    for row in x.chunks(width) {
        let mean = if kind == NormKind::LayerNorm { row.iter().sum::<f64>() / width as f64 } else { 0.0 };
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        let rstd = 1.0 / (variance + EPS).sqrt();
        stats.extend([mean, rstd]);
        for (j, x) in row.iter().enumerate() {
            y.push((x - mean) * rstd * gain.map_or(1.0, |g| g[j]) + bias.map_or(0.0, |b| b[j]));
        }
    }
    (y, stats)
}

/// Rows around 3, so that a mean that is not subtracted shows.
fn inputs<R: Real>(rows: usize, width: usize) -> Vec<R> {
    random::<f64>(rows * width, 1).into_iter().map(|x| R::of(x + 3.0)).collect()
}

fn forward_and_backward<R: Real>() {
    let tolerance = if size_of::<R>() == 4 { 2e-5 } else { 1e-11 };
    for (rows, width) in [(1, 2), (3, 3), (1, 63), (5, 65), (67, 67), (500, 96), (0, 65)] {
        let x: Vec<R> = inputs(rows, width);
        let dy: Vec<R> = random(rows * width, 2);
        let (gain_values, bias_values): (Vec<R>, Vec<R>) = (random(width, 3), random(width, 4));
        for kind in [NormKind::LayerNorm, NormKind::Rms] {
            for (with_gain, with_bias) in [(false, false), (true, false), (false, true), (true, true)] {
                let gain = with_gain.then_some(&gain_values[..]);
                let bias = with_bias.then_some(&bias_values[..]);
                let (wide_gain, wide_bias) = (gain.map(wide), bias.map(wide));
                let (want_y, want_stats) =
                    reference(&wide(&x), wide_gain.as_deref(), wide_bias.as_deref(), width, kind);

                let mut y = vec![R::of(f64::NAN); x.len()];
                let mut stats = vec![R::of(f64::NAN); 2 * rows];
                norm::forward(&mut y, &mut stats, &x, gain, bias, width, kind, EPS);
                // Two elements of a row may nearly coincide; then rstd amplifies their rounding.
                let amplified = tolerance * want_stats.iter().fold(1.0f64, |a, &s| a.max(s.abs()));
                close(&y, &want_y, amplified);
                close(&stats, &want_stats, amplified);

                let mut dx = vec![R::of(f64::NAN); x.len()];
                let (mut dgain, mut dbias) = (gain_values.clone(), bias_values.clone());
                norm::backward(
                    &mut dx,
                    with_gain.then_some(&mut dgain[..]),
                    with_bias.then_some(&mut dbias[..]),
                    &dy,
                    &x,
                    &stats,
                    gain,
                    width,
                    kind,
                );
                let (want_dgain, want_dbias) = affine_gradients(&wide(&x), &want_stats, &wide(&dy), width);
                for (got, before, want, present) in [
                    (&dgain, &gain_values, want_dgain, with_gain),
                    (&dbias, &bias_values, want_dbias, with_bias),
                ] {
                    let want: Vec<f64> = before
                        .iter()
                        .zip(want)
                        .map(|(before, want)| before.f64() + if present { want } else { 0.0 })
                        .collect();
                    close(got, &want, 10.0 * amplified);
                }
                let want = finite_differences(&wide(&x), &wide(&dy), wide_gain.as_deref(), width, kind);
                let rstd = want_stats.iter().fold(1.0f64, |a, &s| a.max(s.abs()));
                let numeric = if size_of::<R>() == 4 { 1e-5 } else { 1e-7 };
                close(&dx, &want, numeric * rstd * rstd);
            }
        }
    }
}

fn affine_gradients(x: &[f64], stats: &[f64], dy: &[f64], width: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut dgain, mut dbias) = (vec![0.0; width], vec![0.0; width]);
    for (i, (x, dy)) in x.iter().zip(dy).enumerate() {
        let (row, column) = (i / width, i % width);
        dgain[column] += dy * (x - stats[2 * row]) * stats[2 * row + 1];
        dbias[column] += dy;
    }
    (dgain, dbias)
}

/// Gradient of Σ dy ⊙ y by central differences.
fn finite_differences(x: &[f64], dy: &[f64], gain: Option<&[f64]>, width: usize, kind: NormKind) -> Vec<f64> {
    let h = 1e-5;
    let mut out = Vec::with_capacity(x.len());
    for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
        let mut moved = x.to_vec();
        for j in 0..width {
            let mut value = |x: f64| {
                moved[j] = x;
                let y = reference(&moved, gain, None, width, kind).0;
                y.iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>()
            };
            let slope = (value(x[j] + h) - value(x[j] - h)) / (2.0 * h);
            value(x[j]);
            out.push(slope);
        }
    }
    out
}

#[test]
fn norm_f32() {
    forward_and_backward::<f32>();
}

#[test]
fn norm_f64() {
    forward_and_backward::<f64>();
}

/// Σx² − nμ² in f32 would lose everything here.
#[test]
fn a_large_mean_does_not_cancel() {
    let x: Vec<f32> = random::<f32>(4 * 192, 1).into_iter().map(|x| 4096.0 + x).collect();
    let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let (mut y, mut stats) = (vec![0.0; x.len()], vec![0.0; 8]);
    norm::forward(&mut y, &mut stats, &x, None, None, 192, NormKind::LayerNorm, EPS);
    close(&y, &reference(&wide, None, None, 192, NormKind::LayerNorm).0, 1e-3);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (rows, width) = (1001, 192);
    let (x, dy): (Vec<f32>, Vec<f32>) = (random(rows * width, 1), random(rows * width, 2));
    let gain: Vec<f32> = random(width, 3);
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let (mut y, mut stats) = (vec![0f32; x.len()], vec![0f32; 2 * rows]);
            let kind = NormKind::LayerNorm;
            norm::forward(&mut y, &mut stats, &x, Some(&gain), None, width, kind, EPS);
            let (mut dx, mut dgain, mut dbias) = (vec![0f32; x.len()], gain.clone(), gain.clone());
            let grads = (Some(&mut dgain[..]), Some(&mut dbias[..]));
            norm::backward(&mut dx, grads.0, grads.1, &dy, &x, &stats, Some(&gain), width, kind);
            [y, stats, dx, dgain, dbias]
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(5));
}
