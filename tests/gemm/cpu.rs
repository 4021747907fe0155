//! Linear layers and GELU of the CPU device against naive loops in f64.

use trencadis::cpu::gemm::{self, Mat, MatMut};
use trencadis::cpu::{elementwise, real::Real};
use trencadis::recipe::GeluKind;

use crate::support::numbers::{close, random};

/// a[m, k] · b[k, n], plain loops.
fn naive(
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
    [m, n, k]: [usize; 3],
) -> Vec<f64> {
    let mut out = Vec::with_capacity(m * n);
    for i in 0..m {
        for j in 0..n {
            out.push((0..k).map(|p| a(i, p) * b(p, j)).sum());
        }
    }
    out
}

fn tolerance<R: Real>() -> f64 {
    if size_of::<R>() == 4 { 2e-5 } else { 1e-12 }
}

fn gelu_reference(x: f64, kind: GeluKind) -> f64 {
    let c = (2.0 / std::f64::consts::PI).sqrt();
    match kind {
        GeluKind::Erf => 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())),
        GeluKind::Tanh => 0.5 * x * (1.0 + (c * (x + 0.044715 * x.powi(3))).tanh()),
    }
}

fn linear_layers<R: Real>() {
    for (m, inner, outer) in [
        (1, 1, 1),
        (3, 63, 65),
        (65, 3, 1),
        (1, 67, 3),
        (67, 65, 63),
        (130, 67, 96),
        (0, 3, 65),
        (300, 64, 192),
    ] {
        let x: Vec<R> = random(m * inner, 1);
        let w: Vec<R> = random(outer * inner, 2);
        let bias: Vec<R> = random(outer, 3);
        let dy: Vec<R> = random(m * outer, 4);
        let at = |v: &[R], width: usize, i: usize, j: usize| v[i * width + j].f64();
        let tolerance = tolerance::<R>();

        let product = naive(|i, p| at(&x, inner, i, p), |p, j| at(&w, inner, j, p), [m, outer, inner]);
        let mut y = vec![R::of(f64::NAN); m * outer];
        gemm::linear(&mut y, &x, &w, None, inner, outer);
        close(&y, &product, tolerance);
        gemm::linear(&mut y, &x, &w, Some(&bias), inner, outer);
        let pre: Vec<f64> = product.iter().enumerate().map(|(i, y)| y + bias[i % outer].f64()).collect();
        close(&y, &pre, tolerance);

        for kind in [GeluKind::Erf, GeluKind::Tanh] {
            let want: Vec<f64> = pre.iter().map(|&x| gelu_reference(x, kind)).collect();
            let mut kept = vec![R::of(f64::NAN); m * outer];
            gemm::linear_gelu(&mut y, Some(&mut kept), &x, &w, Some(&bias), inner, outer, kind);
            close(&kept, &pre, tolerance);
            close(&y, &want, tolerance);
            y.fill(R::of(f64::NAN));
            gemm::linear_gelu(&mut y, None, &x, &w, Some(&bias), inner, outer, kind);
            close(&y, &want, tolerance);
            gemm::linear_gelu(&mut y, None, &x, &w, None, inner, outer, kind);
            let want: Vec<f64> = product.iter().map(|&x| gelu_reference(x, kind)).collect();
            close(&y, &want, tolerance);
        }

        let mut dx = vec![R::of(f64::NAN); m * inner];
        gemm::linear_input_grad(&mut dx, &dy, &w, inner, outer);
        close(
            &dx,
            &naive(|i, p| at(&dy, outer, i, p), |p, j| at(&w, inner, p, j), [m, inner, outer]),
            tolerance,
        );

        let mut dw = w.clone();
        gemm::linear_weight_grad(&mut dw, &dy, &x, inner, outer);
        let mut want = naive(|i, p| at(&dy, outer, p, i), |p, j| at(&x, inner, p, j), [outer, inner, m]);
        want.iter_mut().zip(&w).for_each(|(want, w)| *want += w.f64());
        close(&dw, &want, tolerance);

        let mut db = bias.clone();
        gemm::bias_grad(&mut db, &dy);
        let want: Vec<f64> =
            (0..outer).map(|j| bias[j].f64() + (0..m).map(|i| at(&dy, outer, i, j)).sum::<f64>()).collect();
        close(&db, &want, tolerance);
    }
}

#[test]
fn linear_layers_f32() {
    linear_layers::<f32>();
}

#[test]
fn linear_layers_f64() {
    linear_layers::<f64>();
}

/// Slices of a wider matrix, both operands transposed, scaled and accumulated; elements between
/// the rows of the result stay as they are.
#[test]
fn gemm_on_strided_views() {
    let (m, n, k) = (37, 21, 19);
    let a: Vec<f32> = random(k * 50, 1);
    let b: Vec<f32> = random(n * 40, 2);
    let before: Vec<f32> = random(m * 30, 3);
    let product = naive(|i, p| f64::from(a[5 + p * 50 + i]), |p, j| f64::from(b[7 + j * 40 + p]), [m, n, k]);
    for (accumulate, parallel) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut out = before.clone();
        gemm::gemm(
            MatMut::new(&mut out[2..], m, n, 30),
            accumulate,
            0.25,
            Mat::new(&a[5..], k, m, 50).t(),
            Mat::new(&b[7..], n, k, 40).t(),
            parallel,
        );
        let mut want: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
        for (i, &product) in product.iter().enumerate() {
            let at = 2 + i / n * 30 + i % n;
            want[at] = 0.25 * product + if accumulate { want[at] } else { 0.0 };
        }
        close(&out, &want, 2e-5);
    }
}

#[test]
#[should_panic(expected = "does not lie in its slice")]
fn gemm_refuses_a_short_operand() {
    let (a, b, mut out) = (vec![0f32; 11], vec![0f32; 8], vec![0f32; 6]);
    gemm::gemm(
        MatMut::new(&mut out, 3, 2, 2),
        false,
        1.0,
        Mat::new(&a, 3, 4, 4),
        Mat::new(&b, 4, 2, 2),
        false,
    );
}

#[test]
#[should_panic(expected = "does not lie in its slice")]
fn gemm_refuses_overlapping_rows() {
    let (a, b, mut out) = (vec![0f32; 12], vec![0f32; 8], vec![0f32; 6]);
    gemm::gemm(
        MatMut::new(&mut out, 3, 2, 1),
        false,
        1.0,
        Mat::new(&a, 3, 4, 4),
        Mat::new(&b, 4, 2, 2),
        false,
    );
}

#[test]
#[should_panic(expected = "is not the shape")]
fn gemm_refuses_shapes_that_do_not_match() {
    let (a, b, mut out) = (vec![0f32; 12], vec![0f32; 8], vec![0f32; 6]);
    gemm::gemm(
        MatMut::new(&mut out, 2, 2, 2),
        false,
        1.0,
        Mat::new(&a, 3, 4, 4),
        Mat::new(&b, 4, 2, 2),
        false,
    );
}

/// Forward, both gradients, bias and GELU: the same bits with 1, 2, 3 and 5 threads.
#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (m, inner, outer) = (1029, 192, 576);
    let x: Vec<f32> = random(m * inner, 1);
    let w: Vec<f32> = random(outer * inner, 2);
    let bias: Vec<f32> = random(outer, 3);
    let dy: Vec<f32> = random(m * outer, 4);
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let (mut y, mut pre) = (vec![0f32; m * outer], vec![0f32; m * outer]);
            gemm::linear_gelu(&mut y, Some(&mut pre), &x, &w, Some(&bias), inner, outer, GeluKind::Erf);
            let (mut dx, mut dw, mut db) = (vec![0f32; m * inner], w.clone(), bias.clone());
            gemm::linear_input_grad(&mut dx, &dy, &w, inner, outer);
            gemm::linear_weight_grad(&mut dw, &dy, &x, inner, outer);
            gemm::bias_grad(&mut db, &dy);
            [y, pre, dx, dw, db]
        })
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert!(one == run(threads), "{threads} threads");
    }
}

fn gelu_and_its_gradient<R: Real>() {
    // Central differences of the f64 reference are good to about 1e-9; in f32 1 + tanh(u) has
    // an absolute error near u = -8, which x multiplies.
    let tolerance = if size_of::<R>() == 4 { 1e-5 } else { 1e-8 };
    let n = 20_001;
    let x: Vec<R> = (0..n).map(|i| R::of(f64::from(i) / 1000.0 - 10.0)).collect();
    let dy: Vec<R> = random(n as usize, 1);
    for kind in [GeluKind::Erf, GeluKind::Tanh] {
        let mut y = vec![R::ZERO; x.len()];
        gemm::gelu(&mut y, &x, kind);
        let want: Vec<f64> = x.iter().map(|x| gelu_reference(x.f64(), kind)).collect();
        close(&y, &want, tolerance);
        let mut dx = dy.clone();
        gemm::gelu_grad(&mut dx, &x, kind);
        let h = 1e-5;
        let want: Vec<f64> = x
            .iter()
            .zip(&dy)
            .map(|(x, dy)| {
                let (up, down) = (gelu_reference(x.f64() + h, kind), gelu_reference(x.f64() - h, kind));
                dy.f64() * (up - down) / (2.0 * h)
            })
            .collect();
        close(&dx, &want, tolerance);

        let extreme = [R::of(-1e4), R::of(1e4)];
        let mut y = [R::ONE; 2];
        gemm::gelu(&mut y, &extreme, kind);
        assert_eq!(y.map(R::f64), [0.0, 1e4]);
        let mut dx = [R::ONE; 2];
        gemm::gelu_grad(&mut dx, &extreme, kind);
        assert_eq!(dx.map(R::f64), [0.0, 1.0]);
    }
}

#[test]
fn gelu_f32() {
    gelu_and_its_gradient::<f32>();
}

#[test]
fn gelu_f64() {
    gelu_and_its_gradient::<f64>();
}

#[test]
fn add_adds() {
    for n in [0, 1, 65, 40_000] {
        let (mut y, x): (Vec<f32>, Vec<f32>) = (random(n, 1), random(n, 2));
        let want: Vec<f64> = y.iter().zip(&x).map(|(y, x)| f64::from(y + x)).collect();
        elementwise::add(&mut y, &x);
        close(&y, &want, 0.0);
    }
}
