//! Gaussian blur as Pillow computes it: three passes of a box filter with a fractional radius in each direction
//! ("Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", Gwosdek et al., SSVM 2011), in integers of
//! 24 fractional bits, rounded to 8 bits after every pass.

use crate::data::source::Image;

const PASSES: usize = 3;

/// A box filter of `2·radius + 1` values of weight `whole` and one of weight `part` at either end.
#[derive(Clone, Copy)]
struct Kernel {
    radius: usize,
    whole: u32,
    part: u32,
}

impl Kernel {
    fn new(sigma: f32) -> Self {
        let radius = box_radius(sigma);
        let inner = radius as u32;
        let whole = ((1u32 << 24) as f32 / (radius * 2.0 + 1.0)) as u32;
        let part = ((1 << 24) - (inner * 2 + 1) * whole) / 2;
        Self { radius: inner as usize, whole, part }
    }
}

/// Radius of the box whose filter, applied three times, has the variance `sigma`².
fn box_radius(sigma: f32) -> f32 {
    let variance = sigma * sigma / PASSES as f32;
    // Square root and floor are taken in double precision and stored in single.
    let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
    let l = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
    let mut a = (2.0 * l + 1.0) * (l * (l + 1.0) - 3.0 * variance);
    a /= 6.0 * (variance - (l + 1.0) * (l + 1.0));
    l + a
}

/// `ImageFilter.GaussianBlur(radius)`.
pub(super) fn gaussian_blur(image: &mut Image, radius: f32) {
    if radius <= 0.0 {
        return;
    }
    let kernel = Kernel::new(radius);
    let (height, width, channels) = (image.height, image.width, image.channels);
    let line = width * channels;
    let mut values = vec![0; height.max(width)];
    let mut blurred = values.clone();
    for y in 0..height {
        for channel in 0..channels {
            let lane = Lane { first: y * line + channel, step: channels, length: width };
            lane.blur(&mut image.pixels, kernel, &mut values, &mut blurred);
        }
    }
    for x in 0..line {
        let lane = Lane { first: x, step: line, length: height };
        lane.blur(&mut image.pixels, kernel, &mut values, &mut blurred);
    }
}

/// One channel of a row or column.
struct Lane {
    first: usize,
    step: usize,
    length: usize,
}

impl Lane {
    fn blur(&self, pixels: &mut [u8], kernel: Kernel, values: &mut [u8], blurred: &mut [u8]) {
        let (values, blurred) = (&mut values[..self.length], &mut blurred[..self.length]);
        for (value, pixel) in values.iter_mut().zip(pixels[self.first..].iter().step_by(self.step)) {
            *value = *pixel;
        }
        for _ in 0..PASSES {
            pass(values, blurred, kernel);
            values.copy_from_slice(blurred);
        }
        for (value, pixel) in values.iter().zip(pixels[self.first..].iter_mut().step_by(self.step)) {
            *pixel = *value;
        }
    }
}

/// One pass; beyond its ends the line continues with its first and last value.
fn pass(line: &[u8], blurred: &mut [u8], kernel: Kernel) {
    let Kernel { radius, whole, part } = kernel;
    let last = line.len() - 1;
    let before = |x: usize, distance: usize| u32::from(line[x.saturating_sub(distance)]);
    let after = |x: usize, distance: usize| u32::from(line[(x + distance).min(last)]);
    let mut sum = u32::from(line[0]) * (radius as u32 + 1);
    sum += (1..=radius).map(|distance| after(0, distance)).sum::<u32>();
    for (x, out) in blurred.iter_mut().enumerate() {
        if x > 0 {
            sum = sum + after(x, radius) - before(x - 1, radius);
        }
        let ends = before(x, radius + 1) + after(x, radius + 1);
        *out = ((sum * whole + ends * part + (1 << 23)) >> 24) as u8;
    }
}
