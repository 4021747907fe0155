//! Adafactor (Shazeer & Stern 2018) in the variant that trains Vision Transformers (Zhai et al. 2022, "Scaling Vision
//! Transformers", section 3.4; big_vision's `scale_by_adafactor`, over `optax.scale_by_factored_rms`): relative step
//! sizes and clipping of the update are left out, the momentum is kept in bf16.
//!
//! Of the second moments of a matrix only the means over its rows and columns are kept ([`Factoring`]), from which
//! every rank that has a slice of the matrix needs all. So a step has three parts: [`add_squares`] of every slice,
//! [`update`] from the sums over all of them, [`apply`] to every slice.

use std::ops::Range;

use half::bf16;

use crate::cpu::simd::vectorised;

/// Least number of rows and of columns of a matrix that is factored.
pub const LEAST_FACTORED: usize = 32;
/// ε, added to every squared gradient.
pub const EPS: f64 = 1e-30;

/// What is kept of the second moments of a parameter, in this order: means over its rows, means over its columns; or
/// every element's, where a parameter is no matrix of [`LEAST_FACTORED`] rows and columns or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factoring {
    rows: usize,
    cols: usize,
    factored: bool,
}

impl Factoring {
    /// Of a parameter of `shape`; more than two dimensions are the matrix of the first and all others.
    pub fn of(shape: &[usize]) -> Self {
        let (rows, cols) = match shape {
            [] => (1, 1),
            [len] => (1, *len),
            [rows, cols @ ..] => (*rows, cols.iter().product()),
        };
        Self { rows, cols, factored: rows.min(cols) >= LEAST_FACTORED }
    }

    /// Rows and columns of a matrix that is factored; none where every element has its own second moment.
    pub fn factored(self) -> Option<[usize; 2]> {
        self.factored.then_some([self.rows, self.cols])
    }

    /// How many numbers are kept.
    pub fn len(self) -> usize {
        if self.factored { self.rows + self.cols } else { self.rows * self.cols }
    }

    /// Whether the parameter has no elements.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Calls `f` for each part of a row among the elements `run`: the number of the row, its columns, and where in the
    /// run they are.
    fn rows_of(self, run: Range<usize>, mut f: impl FnMut(usize, Range<usize>, Range<usize>)) {
        let mut at = run.start;
        while at < run.end {
            let (row, col) = (at / self.cols, at % self.cols);
            let len = (self.cols - col).min(run.end - at);
            f(row, col..col + len, at - run.start..at - run.start + len);
            at += len;
        }
    }
}

/// Constants of one step for one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    /// Learning rate of this step.
    pub lr: f64,
    /// How much of its momentum a step keeps.
    pub momentum: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// Factor on the gradient (clipping).
    pub grad_scale: f64,
}

/// How much of the second moments step `step`, from 1, keeps: `min(most, 1 − step^−power)`.
pub fn second_decay(step: u64, power: f64, most: f64) -> f64 {
    (1.0 - (step as f64).powf(-power)).min(most)
}

/// Adds to `sums` the squared gradients of elements `run` of a parameter: to those of their row and of their column, or
/// each to its own.
pub fn add_squares(factoring: Factoring, run: Range<usize>, grad: &[f32], grad_scale: f64, sums: &mut [f64]) {
    let scale = grad_scale as f32;
    let square = |g: f32| f64::from(g * scale) * f64::from(g * scale);
    if !factoring.factored {
        sums[run].iter_mut().zip(grad).for_each(|(sum, &g)| *sum += square(g));
        return;
    }
    let (of_rows, of_cols) = sums.split_at_mut(factoring.rows);
    factoring.rows_of(run, |row, cols, at| {
        vectorised(
            #[inline(always)]
            || {
                let mut sum = 0.0;
                for (of_col, &g) in of_cols[cols].iter_mut().zip(&grad[at]) {
                    let square = square(g);
                    *of_col += square;
                    sum += square;
                }
                of_rows[row] += sum;
            },
        );
    });
}

/// New second moments `v = keep·v + (1 − keep)·(mean of squares + ε)` from the `sums` of all squares, and what gradients
/// are multiplied by: `(v_row / mean of all v_row)^−½` of their row and `v_col^−½` of their column, or `v^−½` of their
/// own.
pub fn update(factoring: Factoring, keep: f64, sums: &[f32], v: &mut [f32]) -> Vec<f32> {
    let moment = |v: &mut f32, sum: f32, count: usize| {
        *v = (keep * f64::from(*v) + (1.0 - keep) * (f64::from(sum) / count as f64 + EPS)) as f32;
    };
    let root = |v: f32, by: f64| (by / f64::from(v)).sqrt() as f32;
    if !factoring.factored {
        v.iter_mut().zip(sums).for_each(|(v, &sum)| moment(v, sum, 1));
        return v.iter().map(|&v| root(v, 1.0)).collect();
    }
    let (of_rows, of_cols) = v.split_at_mut(factoring.rows);
    let (row_sums, col_sums) = sums.split_at(factoring.rows);
    of_rows.iter_mut().zip(row_sums).for_each(|(v, &sum)| moment(v, sum, factoring.cols));
    of_cols.iter_mut().zip(col_sums).for_each(|(v, &sum)| moment(v, sum, factoring.rows));
    let mean = of_rows.iter().map(|&v| f64::from(v)).sum::<f64>() / factoring.rows as f64;
    let rows = of_rows.iter().map(|&v| root(v, mean));
    rows.chain(of_cols.iter().map(|&v| root(v, 1.0))).collect()
}

/// One step in place on elements `run` of a parameter and their momentum: with the gradient u multiplied by `factors`,
/// `m = momentum·m + (1 − momentum)·u` and `p −= lr·(m + weight_decay·p)`, of which m is then rounded to bf16.
pub fn apply(
    (config, factoring): (&Adafactor, Factoring),
    run: Range<usize>,
    factors: &[f32],
    p: &mut [f32],
    m: &mut [bf16],
    grad: &[f32],
) {
    let (keep, new) = (config.momentum as f32, (1.0 - config.momentum) as f32);
    let (scale, rate) = (config.grad_scale as f32, config.lr as f32);
    let decay = (config.lr * config.weight_decay) as f32;
    let step = |p: &mut f32, m: &mut bf16, u: f32| {
        let momentum = keep.mul_add(m.to_f32(), new * u);
        *p -= decay.mul_add(*p, rate * momentum);
        *m = bf16::from_f32(momentum);
    };
    if !factoring.factored {
        for (((p, m), &g), &factor) in p.iter_mut().zip(m).zip(grad).zip(&factors[run]) {
            step(p, m, g * scale * factor);
        }
        return;
    }
    let (of_rows, of_cols) = factors.split_at(factoring.rows);
    factoring.rows_of(run, |row, cols, at| {
        let own = p[at.clone()].iter_mut().zip(&mut m[at.clone()]).zip(&grad[at]);
        for (((p, m), &g), &of_col) in own.zip(&of_cols[cols]) {
            step(p, m, g * scale * of_rows[row] * of_col);
        }
    });
}
