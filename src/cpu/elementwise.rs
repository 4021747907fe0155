//! Sums of whole tensors.

use super::real::Real;

/// `y += x`.
pub fn add<R: Real>(y: &mut [R], x: &[R]) {
    todo!()
}
