//! Residual branch with LayerScale and per-image stochastic depth.

use super::real::Real;
use super::simd::{add_assign, for_each, map, task_len, task_rows, vectorised};

/// `out = out + keep[t] · gamma ⊙ branch`, where `out` holds the residual stream. `gamma[width]`
/// is LayerScale; `keep[t]`, one factor a row, is 0 or 1/(1−rate).
pub fn forward<R: Real>(out: &mut [R], branch: &[R], gamma: Option<&[R]>, keep: Option<&[R]>, width: usize) {
    let len = task_len(width);
    for_each(out.chunks_mut(len).zip(branch.chunks(len)).enumerate(), |(task, (out, branch))| {
        let first = task * task_rows(width);
        vectorised(
            #[inline(always)]
            || {
                let rows = out.chunks_exact_mut(width).zip(branch.chunks_exact(width));
                for (row, (out, branch)) in rows.enumerate() {
                    let elements = out.iter_mut().zip(branch);
                    match (gamma, keep.map(|keep| keep[first + row])) {
                        (None, None) => elements.for_each(|(o, &b)| *o += b),
                        (None, Some(keep)) => elements.for_each(|(o, &b)| *o = keep.mul_add(b, *o)),
                        (Some(gamma), None) => {
                            elements.zip(gamma).for_each(|((o, &b), &gamma)| *o = gamma.mul_add(b, *o));
                        }
                        (Some(gamma), Some(keep)) => elements
                            .zip(gamma)
                            .for_each(|((o, &b), &gamma)| *o = (keep * gamma).mul_add(b, *o)),
                    }
                }
            },
        );
    });
}

/// `dbranch = keep ⊙ gamma ⊙ dout` (written) and `dgamma += Σ_rows keep ⊙ dout ⊙ branch`.
pub fn backward<R: Real>(
    dbranch: &mut [R],
    dgamma: Option<&mut [R]>,
    dout: &[R],
    branch: &[R],
    gamma: Option<&[R]>,
    keep: Option<&[R]>,
    width: usize,
) {
    let len = task_len(width);
    let want = dgamma.is_some();
    let tasks = dbranch.chunks_mut(len).zip(dout.chunks(len)).enumerate();
    let partials = map(tasks, |(task, (dbranch, dout))| {
        let first = task * task_rows(width);
        let mut sum = vec![R::ZERO; if want { width } else { 0 }];
        vectorised(
            #[inline(always)]
            || {
                let rows = dbranch.chunks_exact_mut(width).zip(dout.chunks_exact(width));
                for (row, (dbranch, dout)) in rows.enumerate() {
                    let row = first + row;
                    let keep = keep.map_or(R::ONE, |keep| keep[row]);
                    let elements = dbranch.iter_mut().zip(dout);
                    match gamma {
                        Some(gamma) => {
                            elements.zip(gamma).for_each(|((db, &d), &gamma)| *db = keep * gamma * d);
                        }
                        None => elements.for_each(|(db, &d)| *db = keep * d),
                    }
                    if want {
                        let branch = &branch[row * width..(row + 1) * width];
                        for ((sum, &d), &b) in sum.iter_mut().zip(dout).zip(branch) {
                            *sum = (keep * d).mul_add(b, *sum);
                        }
                    }
                }
            },
        );
        sum
    });
    if let Some(dgamma) = dgamma {
        partials.iter().for_each(|partial| add_assign(dgamma, partial));
    }
}
