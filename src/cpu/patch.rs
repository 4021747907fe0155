//! From pixels to tokens: normalised patches, prefix tokens.

use super::real::Real;
use crate::data::batch::Patches;

/// `out[t, c·P² + p] = (x/255 − mean[c]) / std[c]` for u8 pixels (f32 patches are copied as they
/// are); rows whose position is [`crate::data::batch::PREFIX`] are zero. `mean` and `std` have one entry a channel.
pub fn normalise<R: Real>(
    out: &mut [R],
    patches: &Patches,
    positions: &[[u16; 2]],
    mean: &[f32],
    std: &[f32],
    patch_dim: usize,
) {
    todo!()
}

/// Writes `tokens[prefix, width]` over the first `prefix` rows of every image in `x`.
pub fn write_prefix<R: Real>(x: &mut [R], tokens: &[R], cu_seqlens: &[i32], prefix: usize, width: usize) {
    todo!()
}

/// `dtokens += ` the sum over images of the gradient at the prefix rows; those rows of `dx`
/// become zero.
pub fn write_prefix_grad<R: Real>(
    dx: &mut [R],
    dtokens: Option<&mut [R]>,
    cu_seqlens: &[i32],
    prefix: usize,
    width: usize,
) {
    todo!()
}
