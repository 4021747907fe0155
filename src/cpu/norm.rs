//! LayerNorm and RMSNorm over rows, with and without gain and bias.

use super::real::Real;
use crate::models::recipe::NormKind;

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
    todo!()
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
    todo!()
}
