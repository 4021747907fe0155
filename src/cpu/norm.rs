//! LayerNorm and RMSNorm over rows, with and without gain and bias.
//!
//! With n = (x − μ)·rstd and g = dy ⊙ gain: `dx = rstd·(g − mean(g) − n·mean(g ⊙ n))`, without the
//! term mean(g) for RMSNorm; `dgain = Σ_rows dy ⊙ n`, `dbias = Σ_rows dy`.

use super::real::Real;
use super::simd::{add_assign, for_each, map, sum_by, sum2_by, task_len, task_rows, vectorised};
use crate::recipe::NormKind;

/// `y = (x − μ)·rstd ⊙ gain + bias` with μ = 0 for RMSNorm; biased variance.
/// `stats[rows, 2]` receives (μ, rstd).
#[allow(clippy::too_many_arguments)]
pub fn forward<R: Real>(
    y: &mut [R],
    stats: &mut [R],
    x: &[R],
    gain: Option<&[R]>,
    bias: Option<&[R]>,
    width: usize,
    kind: NormKind,
    eps: f64,
) {
    let len = task_len(width);
    let tasks = y.chunks_mut(len).zip(x.chunks(len)).zip(stats.chunks_mut(2 * task_rows(width)));
    for_each(tasks, |((y, x), stats)| {
        vectorised(
            #[inline(always)]
            || {
                let rows = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for ((y, x), stats) in rows.zip(stats.chunks_exact_mut(2)) {
                    let (mean, rstd) = row_stats(x, kind, R::of(eps));
                    stats.copy_from_slice(&[mean, rstd]);
                    write_row(y, x, mean, rstd, gain, bias);
                }
            },
        );
    });
}

/// (μ, rstd) of a row. The variance is summed over x − μ, in a second pass over a row that is
/// still in L1: Σx² − nμ² would cancel.
#[inline(always)]
fn row_stats<R: Real>(x: &[R], kind: NormKind, eps: R) -> (R, R) {
    let scale = R::ONE / R::of(x.len() as f64);
    let mean = match kind {
        NormKind::LayerNorm => sum_by(x, |x| x) * scale,
        NormKind::Rms => R::ZERO,
    };
    let variance = sum_by(x, |x| (x - mean) * (x - mean)) * scale;
    (mean, R::ONE / (variance + eps).sqrt())
}

#[inline(always)]
fn write_row<R: Real>(y: &mut [R], x: &[R], mean: R, rstd: R, gain: Option<&[R]>, bias: Option<&[R]>) {
    let row = y.iter_mut().zip(x);
    match (gain, bias) {
        (None, None) => row.for_each(|(y, &x)| *y = (x - mean) * rstd),
        (Some(gain), None) => row.zip(gain).for_each(|((y, &x), &gain)| *y = (x - mean) * rstd * gain),
        (None, Some(bias)) => row.zip(bias).for_each(|((y, &x), &bias)| *y = (x - mean) * rstd + bias),
        (Some(gain), Some(bias)) => row
            .zip(gain)
            .zip(bias)
            .for_each(|(((y, &x), &gain), &bias)| *y = ((x - mean) * rstd).mul_add(gain, bias)),
    }
}

/// `dx` (written), `dgain` and `dbias` (added to).
#[allow(clippy::too_many_arguments)]
pub fn backward<R: Real>(
    dx: &mut [R],
    dgain: Option<&mut [R]>,
    dbias: Option<&mut [R]>,
    dy: &[R],
    x: &[R],
    stats: &[R],
    gain: Option<&[R]>,
    width: usize,
    kind: NormKind,
) {
    let len = task_len(width);
    let want = (dgain.is_some(), dbias.is_some());
    let tasks =
        dx.chunks_mut(len).zip(dy.chunks(len)).zip(x.chunks(len)).zip(stats.chunks(2 * task_rows(width)));
    let partials = map(tasks, |(((dx, dy), x), stats)| {
        let mut dgain = vec![R::ZERO; if want.0 { width } else { 0 }];
        let mut dbias = vec![R::ZERO; if want.1 { width } else { 0 }];
        vectorised(
            #[inline(always)]
            || {
                let rows = dx.chunks_exact_mut(width).zip(dy.chunks_exact(width)).zip(x.chunks_exact(width));
                for (((dx, dy), x), stats) in rows.zip(stats.chunks_exact(2)) {
                    let (mean, rstd) = (stats[0], stats[1]);
                    row_gradient(dx, dy, x, mean, rstd, gain, kind);
                    for ((sum, &dy), &x) in dgain.iter_mut().zip(dy).zip(x) {
                        *sum += dy * ((x - mean) * rstd);
                    }
                    add_assign(&mut dbias, dy);
                }
            },
        );
        (dgain, dbias)
    });
    let (dgains, dbiases): (Vec<_>, Vec<_>) = partials.into_iter().unzip();
    for (total, partials) in [(dgain, dgains), (dbias, dbiases)] {
        if let Some(total) = total {
            partials.iter().for_each(|partial| add_assign(total, partial));
        }
    }
}

#[inline(always)]
fn row_gradient<R: Real>(
    dx: &mut [R],
    dy: &[R],
    x: &[R],
    mean: R,
    rstd: R,
    gain: Option<&[R]>,
    kind: NormKind,
) {
    // dx holds g until the sums are known.
    match gain {
        Some(gain) => dx.iter_mut().zip(dy).zip(gain).for_each(|((g, &dy), &gain)| *g = dy * gain),
        None => dx.copy_from_slice(dy),
    }
    let scale = R::ONE / R::of(dx.len() as f64);
    let mean_g = match kind {
        NormKind::LayerNorm => sum_by(dx, |g| g) * scale,
        NormKind::Rms => R::ZERO,
    };
    let mean_gn = sum2_by(dx, x, |g, x| g * ((x - mean) * rstd)) * scale;
    for (g, &x) in dx.iter_mut().zip(x) {
        *g = rstd * (*g - mean_g - (x - mean) * rstd * mean_gn);
    }
}
