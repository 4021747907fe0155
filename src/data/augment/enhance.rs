//! Brightness, contrast, saturation and sharpness, computed as Pillow's `ImageEnhance` does: the image is blended with a
//! degenerate version of itself, in single precision, and the fraction cut off.

use super::table::{replace, table};
use crate::data::source::{Image, decode::luma};

/// Pillow's `Image.blend` of one value: `factor` of `value`, the rest of `degenerate`; casts cut off what lies outside
/// of 0..255.
fn blend(degenerate: u8, value: u8, factor: f32) -> u8 {
    (f32::from(degenerate) + factor * (f32::from(value) - f32::from(degenerate))) as u8
}

/// Replaces colours by their luma (BT.601); grey stays as it is.
pub(super) fn grayscale(image: &mut Image) {
    if image.channels == 3 {
        image.pixels.as_chunks_mut::<3>().0.iter_mut().for_each(|pixel| *pixel = [luma(*pixel); 3]);
    }
}

/// Blends with black.
pub(super) fn brightness(image: &mut Image, factor: f32) {
    replace(image, &table(|value| blend(0, value, factor)));
}

/// Blends with the mean luma of the image.
pub(super) fn contrast(image: &mut Image, factor: f32) {
    let (sum, count) = if image.channels == 3 {
        let pixels = image.pixels.as_chunks::<3>().0;
        (pixels.iter().map(|pixel| u64::from(luma(*pixel))).sum::<u64>(), pixels.len())
    } else {
        (image.pixels.iter().map(|&value| u64::from(value)).sum(), image.pixels.len())
    };
    let mean = (sum as f64 / count.max(1) as f64 + 0.5) as u8;
    replace(image, &table(|value| blend(mean, value, factor)));
}

/// Blends with the image's luma; grey has no saturation and stays as it is.
pub(super) fn saturation(image: &mut Image, factor: f32) {
    if image.channels == 3 {
        for pixel in image.pixels.as_chunks_mut::<3>().0 {
            let grey = luma(*pixel);
            *pixel = pixel.map(|value| blend(grey, value, factor));
        }
    }
}

/// Blends with the image smoothed by `ImageFilter.SMOOTH`: 3×3 neighbours of weight 1/13, the middle 5/13. The border
/// is not smoothed.
pub(super) fn sharpness(image: &mut Image, factor: f32) {
    let (height, width, channels) = (image.height, image.width, image.channels);
    if height < 3 || width < 3 {
        return;
    }
    let (side, middle) = (1.0 / 13.0f32, 5.0 / 13.0f32);
    let line = width * channels;
    let original = image.pixels.clone();
    for y in 1..height - 1 {
        for i in y * line + channels..(y + 1) * line - channels {
            let value = |at: usize| f32::from(original[at]);
            // Three sums of three from the row below upwards: the order decides the rounding.
            let row = |at: usize, weight: f32| {
                value(at - channels) * side + value(at) * weight + value(at + channels) * side
            };
            let smooth = 0.5 + row(i + line, side) + row(i, middle) + row(i - line, side);
            image.pixels[i] = blend(smooth as u8, original[i], factor);
        }
    }
}
