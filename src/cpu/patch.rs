//! From pixels to tokens: normalised patches, prefix tokens.

use super::real::Real;
use super::simd::{add_assign, for_each, task_len, task_rows, vectorised};
use crate::data::batch::{PREFIX, Patches};

/// `out[t, c·P² + p] = (x/255 − mean[c]) / std[c]` for u8 pixels (f32 patches are copied as they
/// are); rows whose position is [`crate::data::batch::PREFIX`] are zero. `mean` and `std` have one
/// entry a channel, or a single one for all channels. `out` may be shorter than `patches`: its
/// rows are the first ones.
///
/// # Panics
/// If `patches` are pictures, which only a GPU makes patches of: a bug of the caller, not of a user.
pub fn normalise<R: Real>(
    out: &mut [R],
    patches: &Patches,
    positions: &[[u16; 2]],
    mean: &[f32],
    std: &[f32],
    patch_dim: usize,
) {
    // (x/255 − mean)/std = x·a + b, one (a, b) a channel.
    let channels = mean.len().max(std.len()).max(1);
    let factors: Vec<(R, R)> = (0..channels)
        .map(|c| {
            let entry = |values: &[f32]| f64::from(values[if values.len() == 1 { 0 } else { c }]);
            (R::of(1.0 / (255.0 * entry(std))), R::of(-entry(mean) / entry(std)))
        })
        .collect();
    let plane = patch_dim / channels;
    for_each(out.chunks_mut(task_len(patch_dim)).enumerate(), |(task, out)| {
        let first = task * task_rows(patch_dim);
        vectorised(
            #[inline(always)]
            || {
                for (row, out) in out.chunks_exact_mut(patch_dim).enumerate() {
                    let row = first + row;
                    let range = row * patch_dim..(row + 1) * patch_dim;
                    if positions[row] == PREFIX {
                        out.fill(R::ZERO);
                        continue;
                    }
                    match patches {
                        Patches::U8(pixels) => {
                            let planes = out.chunks_exact_mut(plane).zip(pixels[range].chunks_exact(plane));
                            for ((out, pixels), &(a, b)) in planes.zip(&factors) {
                                out.iter_mut()
                                    .zip(pixels)
                                    .for_each(|(o, &x)| *o = R::of(f64::from(x)).mul_add(a, b));
                            }
                        }
                        Patches::F32(values) => {
                            out.iter_mut().zip(&values[range]).for_each(|(o, &x)| *o = R::of(f64::from(x)))
                        }
                        Patches::Pictures(_) => panic!("the CPU device takes patches, and no pictures"),
                    }
                }
            },
        );
    });
}

/// The elements of `x[T, width]` that hold the first `prefix` tokens of each image.
fn prefix_ranges(
    cu_seqlens: &[i32],
    prefix: usize,
    width: usize,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    cu_seqlens.windows(2).map(move |image| {
        let (start, end) = (image[0] as usize, image[1] as usize);
        start * width..end.min(start + prefix) * width
    })
}

/// Writes `tokens[prefix, width]` over the first `prefix` rows of every image in `x`.
pub fn write_prefix<R: Real>(x: &mut [R], tokens: &[R], cu_seqlens: &[i32], prefix: usize, width: usize) {
    for range in prefix_ranges(cu_seqlens, prefix, width) {
        x[range.clone()].copy_from_slice(&tokens[..range.len()]);
    }
}

/// `dtokens += ` the sum over images of the gradient at the prefix rows; those rows of `dx`
/// become zero.
pub fn write_prefix_grad<R: Real>(
    dx: &mut [R],
    mut dtokens: Option<&mut [R]>,
    cu_seqlens: &[i32],
    prefix: usize,
    width: usize,
) {
    for range in prefix_ranges(cu_seqlens, prefix, width) {
        let rows = &mut dx[range];
        if let Some(dtokens) = &mut dtokens {
            add_assign(dtokens, rows);
        }
        rows.fill(R::ZERO);
    }
}
