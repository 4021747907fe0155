//! Residual branch with LayerScale and per-image stochastic depth.

use super::real::Real;

/// `out = out + keep[t] · gamma ⊙ branch`, where `out` holds the residual stream. `gamma[width]`
/// is LayerScale; `keep[t]`, one factor a row, is 0 or 1/(1−rate).
pub fn forward<R: Real>(out: &mut [R], branch: &[R], gamma: Option<&[R]>, keep: Option<&[R]>, width: usize) {
    todo!()
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
    todo!()
}
