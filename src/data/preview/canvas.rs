//! An RGB picture and the few things that are drawn on it.

use std::path::Path;

use super::font;
use crate::data::source::Image;
use crate::data::view::resized;
use crate::error::{Error, Result};
use crate::files::write_atomic;

/// sRGB, 8 bits each.
pub type Colour = [u8; 3];

/// The picture's ground.
pub const GROUND: Colour = [18, 20, 25];
/// Text.
pub const INK: Colour = [214, 217, 224];
/// Padding and its hatching.
const HATCH: [Colour; 2] = [[38, 41, 48], [82, 87, 97]];

/// Rows from the top; drawing outside is cut off.
pub struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<Colour>,
}

impl Canvas {
    /// A picture of plain ground.
    pub fn new(width: usize, height: usize) -> Self {
        Self { width, height, pixels: vec![GROUND; width * height] }
    }

    /// Sets one pixel.
    pub fn set(&mut self, x: usize, y: usize, colour: Colour) {
        if x < self.width && y < self.height {
            self.pixels[y * self.width + x] = colour;
        }
    }

    /// One pixel, which lies within.
    #[cfg(test)]
    pub fn pixel(&self, x: usize, y: usize) -> Colour {
        self.pixels[y * self.width + x]
    }

    /// Fills a rectangle with what `colour` gives for (x, y) within it.
    pub fn paint(
        &mut self,
        (x, y): (usize, usize),
        (width, height): (usize, usize),
        colour: impl Fn(usize, usize) -> Colour,
    ) {
        for dy in 0..height {
            for dx in 0..width {
                self.set(x + dx, y + dy, colour(dx, dy));
            }
        }
    }

    /// A cell of padding: grey, hatched across cells without a seam.
    pub fn hatch(&mut self, at: (usize, usize), side: usize) {
        self.paint((at.0 + 1, at.1 + 1), (side - 2, side - 2), |dx, dy| {
            HATCH[usize::from((at.0 + dx + at.1 + dy) % 6 < 2)]
        });
    }

    /// A cell of a prefix token: the image's colour with a diamond.
    pub fn prefix(&mut self, at: (usize, usize), side: usize, colour: Colour) {
        let middle = side as isize - 1;
        self.paint(at, (side, side), |dx, dy| {
            let distance = (2 * dx as isize - middle).abs() + (2 * dy as isize - middle).abs();
            if distance <= middle * 3 / 4 { GROUND } else { colour }
        });
    }

    /// Writes lower-case text with its top left corner at `at`, each font pixel `scale` wide;
    /// returns the x behind it.
    pub fn text(&mut self, at: (usize, usize), scale: usize, text: &str, colour: Colour) -> usize {
        let mut x = at.0;
        for character in text.chars() {
            for (column, bits) in font::glyph(character).into_iter().enumerate() {
                for row in (0..font::HEIGHT).filter(|row| bits >> row & 1 == 1) {
                    let corner = (x + column * scale, at.1 + row * scale);
                    self.paint(corner, (scale, scale), |_, _| colour);
                }
            }
            x += (font::WIDTH + 1) * scale;
        }
        x
    }

    /// Draws an image with its top left corner at `corner`, resized to `size` (height, width).
    pub fn picture(&mut self, image: &Image, corner: (usize, usize), size: (usize, usize)) {
        let Ok(shown) = resized(image.clone(), size) else { return };
        self.paint(corner, (shown.width, shown.height), |x, y| shown.colour(x, y));
    }

    /// Saves as PNG.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut png = std::io::Cursor::new(Vec::new());
        image::write_buffer_with_format(
            &mut png,
            self.pixels.as_flattened(),
            self.width as u32,
            self.height as u32,
            image::ExtendedColorType::Rgb8,
            image::ImageFormat::Png,
        )
        .map_err(|e| Error::write(path, e))?;
        write_atomic(path, |file| file.write_all(png.get_ref()))
    }
}

/// (height, width) of the image at the largest scale that fits.
pub fn fitted(image: &Image, height: usize, width: usize) -> (usize, usize) {
    let scale = (height as f64 / image.height as f64).min(width as f64 / image.width as f64);
    let scaled = |pixels: usize, most: usize| ((pixels as f64 * scale).round() as usize).clamp(1, most);
    (scaled(image.height, height), scaled(image.width, width))
}

/// The colour of the `index`-th image: hues a golden angle apart at equal lightness and chroma in
/// Oklab (Ottosson 2020), so that neighbours differ and none stands out.
pub fn palette(index: usize) -> Colour {
    let hue = index as f64 * 2.399_963_229_728_653 + 0.6;
    let (lightness, a, b) = (0.76, 0.135 * hue.cos(), 0.135 * hue.sin());
    let l = (lightness + 0.396_337_777_4 * a + 0.215_803_757_3 * b).powi(3);
    let m = (lightness - 0.105_561_345_8 * a - 0.063_854_172_8 * b).powi(3);
    let s = (lightness - 0.089_484_177_5 * a - 1.291_485_548_0 * b).powi(3);
    [
        4.076_741_662_1 * l - 3.307_711_591_3 * m + 0.230_969_929_2 * s,
        -1.268_438_004_6 * l + 2.609_757_401_1 * m - 0.341_319_396_5 * s,
        -0.004_196_086_3 * l - 0.703_418_614_7 * m + 1.707_614_701_0 * s,
    ]
    .map(|linear: f64| {
        let linear = linear.clamp(0.0, 1.0);
        let encoded =
            if linear <= 0.003_130_8 { 12.92 * linear } else { 1.055 * linear.powf(1.0 / 2.4) - 0.055 };
        (255.0 * encoded).round() as u8
    })
}

/// `share` of `a`, the rest of `b`.
pub fn mix(a: Colour, b: Colour, share: f64) -> Colour {
    std::array::from_fn(|i| (f64::from(a[i]) * share + f64::from(b[i]) * (1.0 - share)).round() as u8)
}
