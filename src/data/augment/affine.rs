//! Rotation, shear and translation as Pillow's `Image.transform(AFFINE, BICUBIC)` computes them: for every pixel the place
//! in the original that it comes from, a cubic through 4×4 neighbours (a = −1, in double precision, the fraction cut off),
//! and a plain colour where the place lies outside.

use std::array::from_fn;

use crate::data::source::Image;

/// `[a, b, c, d, e, f]`: pixel centre (x, y) comes from (a·x + b·y + c, d·x + e·y + f).
type Matrix = [f64; 6];

/// Counterclockwise about the centre.
pub(super) fn rotate(image: &mut Image, degrees: f64, fill: &[u8]) {
    if degrees.rem_euclid(360.0) == 0.0 {
        return;
    }
    // Pillow rounds the matrix to 15 decimals.
    let rounded = |value: f64| (value * 1e15).round_ties_even() / 1e15;
    let (sin, cos) = libm::sincos(-degrees.rem_euclid(360.0).to_radians());
    let (sin, cos) = (rounded(sin), rounded(cos));
    let (x, y) = (image.width as f64 / 2.0, image.height as f64 / 2.0);
    let c = cos * -x + sin * -y + x;
    let f = -sin * -x + cos * -y + y;
    transform(image, [cos, sin, c, -sin, cos, f], fill);
}

/// Rows shift by `factor` pixels a row.
pub(super) fn shear_x(image: &mut Image, factor: f64, fill: &[u8]) {
    transform(image, [1.0, factor, 0.0, 0.0, 1.0, 0.0], fill);
}

/// Columns shift by `factor` pixels a column.
pub(super) fn shear_y(image: &mut Image, factor: f64, fill: &[u8]) {
    transform(image, [1.0, 0.0, 0.0, factor, 1.0, 0.0], fill);
}

/// Moves the picture to the left by a share of its width.
pub(super) fn translate_x(image: &mut Image, share: f64, fill: &[u8]) {
    let pixels = share * image.width as f64;
    transform(image, [1.0, 0.0, pixels, 0.0, 1.0, 0.0], fill);
}

/// Moves the picture up by a share of its height.
pub(super) fn translate_y(image: &mut Image, share: f64, fill: &[u8]) {
    let pixels = share * image.height as f64;
    transform(image, [1.0, 0.0, 0.0, 0.0, 1.0, pixels], fill);
}

fn transform(image: &mut Image, matrix: Matrix, fill: &[u8]) {
    if image.channels == 1 {
        warp::<1>(image, matrix, fill);
    } else {
        warp::<3>(image, matrix, fill);
    }
}

fn warp<const CHANNELS: usize>(image: &mut Image, [a, b, c, d, e, f]: Matrix, fill: &[u8]) {
    let (height, width) = (image.height, image.width);
    let original = image.pixels.clone();
    let original = original.as_chunks::<CHANNELS>().0;
    let fill: [u8; CHANNELS] = from_fn(|channel| fill.get(channel % fill.len().max(1)).copied().unwrap_or(0));
    let come_from = |pixel: &mut [u8; CHANNELS], x: f64, y: f64| {
        let (x, y) = (a * x + b * y + c, d * x + e * y + f);
        if !(0.0..width as f64).contains(&x) || !(0.0..height as f64).contains(&y) {
            *pixel = fill;
            return;
        }
        let (columns, dx) = neighbours(x, width);
        let (rows, dy) = neighbours(y, height);
        let lines: [[f64; CHANNELS]; 4] = rows.map(|row| {
            let line = &original[row * width..][..width];
            let four = columns.map(|column| line[column].map(f64::from));
            from_fn(|channel| cubic(four.map(|values| values[channel]), dx))
        });
        *pixel = from_fn(|channel| cubic(lines.map(|values| values[channel]), dy) as u8);
    };
    for (y, row) in image.pixels.as_chunks_mut::<CHANNELS>().0.chunks_exact_mut(width).enumerate() {
        for (x, pixel) in row.iter_mut().enumerate() {
            come_from(pixel, x as f64 + 0.5, y as f64 + 0.5);
        }
    }
}

/// The four indices around the place `at` ≥ 0, the edges repeated, and how far it lies behind the second one's centre.
fn neighbours(at: f64, length: usize) -> ([usize; 4], f64) {
    let at = at - 0.5;
    // Rounded down; `f64::floor` is a call.
    let first = if at < 0.0 { -1 } else { at as isize };
    let index = |k: usize| (first + k as isize - 1).clamp(0, length as isize - 1) as usize;
    (from_fn(index), at - first as f64)
}

/// The cubic of Keys with a = −1 through four values, at `d` behind the second.
fn cubic([v0, v1, v2, v3]: [f64; 4], d: f64) -> f64 {
    v1 + d * ((v2 - v0) + d * ((2.0 * (v0 - v1) + v2 - v3) + d * (-v0 + v1 - v2 + v3)))
}
