//! Residual branch of the CPU device against plain loops in f64.

use trencadis::cpu::{real::Real, residual};

use crate::support::numbers::{close, random};

fn forward_and_backward<R: Real>() {
    let tolerance = if size_of::<R>() == 4 { 1e-5 } else { 1e-12 };
    for (rows, width) in [(1, 1), (3, 63), (65, 65), (67, 3), (400, 96), (0, 67)] {
        let [out, branch, dout]: [Vec<R>; 3] = [1, 2, 3].map(|seed| random(rows * width, seed));
        let gamma_values: Vec<R> = random(width, 4);
        let keep_values: Vec<R> = (0..rows).map(|t| R::of(if t % 3 == 0 { 0.0 } else { 1.25 })).collect();
        for (with_gamma, with_keep) in [(false, false), (true, false), (false, true), (true, true)] {
            let gamma = with_gamma.then_some(&gamma_values[..]);
            let keep = with_keep.then_some(&keep_values[..]);
            let keep_of = |i: usize| keep.map_or(1.0, |keep| keep[i / width].f64());
            let gamma_of = |i: usize| gamma.map_or(1.0, |gamma| gamma[i % width].f64());

            let mut got = out.clone();
            residual::forward(&mut got, &branch, gamma, keep, width);
            let want: Vec<f64> =
                (0..out.len()).map(|i| out[i].f64() + keep_of(i) * gamma_of(i) * branch[i].f64()).collect();
            close(&got, &want, tolerance);

            let mut dbranch = vec![R::of(f64::NAN); branch.len()];
            let mut dgamma = gamma_values.clone();
            let wanted = with_gamma.then_some(&mut dgamma[..]);
            residual::backward(&mut dbranch, wanted, &dout, &branch, gamma, keep, width);
            let want: Vec<f64> = (0..out.len()).map(|i| keep_of(i) * gamma_of(i) * dout[i].f64()).collect();
            close(&dbranch, &want, tolerance);
            let mut want: Vec<f64> = gamma_values.iter().map(|gamma| gamma.f64()).collect();
            if with_gamma {
                for i in 0..out.len() {
                    want[i % width] += keep_of(i) * dout[i].f64() * branch[i].f64();
                }
            }
            close(&dgamma, &want, 10.0 * tolerance);
        }
    }
}

#[test]
fn residual_f32() {
    forward_and_backward::<f32>();
}

#[test]
fn residual_f64() {
    forward_and_backward::<f64>();
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (rows, width) = (1001, 192);
    let [branch, dout]: [Vec<f32>; 2] = [1, 2].map(|seed| random(rows * width, seed));
    let gamma: Vec<f32> = random(width, 3);
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let (mut dbranch, mut dgamma) = (vec![0f32; branch.len()], gamma.clone());
            residual::backward(&mut dbranch, Some(&mut dgamma), &dout, &branch, Some(&gamma), None, width);
            [dbranch, dgamma]
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(5));
}
