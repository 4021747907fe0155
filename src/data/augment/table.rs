//! Operations that look each value up in a table of 256, computed as Pillow's `ImageOps` does.

use crate::data::source::Image;

/// Replaces every value by the one that `table` has for it.
pub(super) fn replace(image: &mut Image, table: &[u8; 256]) {
    image.pixels.iter_mut().for_each(|value| *value = table[usize::from(*value)]);
}

/// The table of a function of the value.
pub(super) fn table(f: impl Fn(u8) -> u8) -> [u8; 256] {
    std::array::from_fn(|value| f(value as u8))
}

/// `ImageOps.invert`.
pub(super) fn invert(image: &mut Image) {
    replace(image, &table(|value| 255 - value));
}

/// `ImageOps.solarize`: inverts the values from `threshold` (0..=256) on.
pub(super) fn solarize(image: &mut Image, threshold: u16) {
    replace(image, &table(|value| if u16::from(value) < threshold { value } else { 255 - value }));
}

/// timm's `solarize_add`: adds to the values below 128.
pub(super) fn solarize_add(image: &mut Image, add: u8) {
    replace(image, &table(|value| if value < 128 { value.saturating_add(add) } else { value }));
}

/// `ImageOps.posterize`, and nothing from 8 bits on: keeps the upper `bits` of each value.
pub(super) fn posterize(image: &mut Image, bits: u32) {
    let mask = !0xFFu8.checked_shr(bits).unwrap_or(0);
    replace(image, &table(|value| value & mask));
}

/// `ImageOps.autocontrast`: stretches each channel to 0..255.
pub(super) fn autocontrast(image: &mut Image) {
    each_channel(image, |histogram| {
        let low = histogram.iter().position(|&count| count > 0)?;
        let high = histogram.iter().rposition(|&count| count > 0)?;
        if high <= low {
            return None;
        }
        let scale = 255.0 / (high - low) as f64;
        let offset = -(low as f64) * scale;
        // Casts cut the fraction off and what is outside, as Python's `int` and the clamp behind it do.
        Some(table(|value| (f64::from(value) * scale + offset) as u8))
    });
}

/// `ImageOps.equalize`: flattens each channel's histogram.
pub(super) fn equalize(image: &mut Image) {
    each_channel(image, |histogram| {
        let last = *histogram.iter().rfind(|&&count| count > 0)?;
        let step = (histogram.iter().sum::<usize>() - last) / 255;
        if step == 0 {
            return None;
        }
        let mut sum = step / 2;
        let mut table = [0; 256];
        for (entry, count) in table.iter_mut().zip(histogram) {
            *entry = (sum / step).min(255) as u8;
            sum += count;
        }
        Some(table)
    });
}

/// Replaces each channel by the table that is made of its histogram, if any.
fn each_channel(image: &mut Image, make: impl Fn(&[usize; 256]) -> Option<[u8; 256]>) {
    let channels = image.channels;
    for channel in 0..channels {
        let mut histogram = [0; 256];
        let values = image.pixels.iter().skip(channel).step_by(channels);
        values.for_each(|&value| histogram[usize::from(value)] += 1);
        if let Some(table) = make(&histogram) {
            let values = image.pixels.iter_mut().skip(channel).step_by(channels);
            values.for_each(|value| *value = table[usize::from(*value)]);
        }
    }
}
