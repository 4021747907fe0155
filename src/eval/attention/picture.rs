//! Draws what the vector of an image attends to: the image beside its map, and where wanted one map a head.

use super::PoolingMap;
use crate::data::draw::Draw;
use crate::data::frame::Frame;
use crate::data::packing::{PackingSettings, PlannedImage};
use crate::data::preview::canvas::{Canvas, Colour, GROUND, INK, fitted, mix};
use crate::data::preview::font;
use crate::data::source::{Image, Source};
use crate::data::view::{ViewSettings, Viewer};
use crate::error::{Error, Result};
use crate::eval::predict::Scored;
use crate::recipe::{PoolKind, Recipe};

/// Longer side of the image, and of the map of a head.
const SIDE: usize = 480;
const HEAD_SIDE: usize = 232;
/// Maps of heads side by side.
const COLUMNS: usize = 4;
const MARGIN: usize = 24;
const SPACE: usize = 16;
/// Least width between the margins, for the texts.
const LEAST_WIDTH: usize = 480;
/// Height of the bar that explains the colours.
const BAR: usize = 14;
/// Share of the map's colour over the grey image.
const COVER: f64 = 0.72;

/// matplotlib's `inferno` (S. van der Walt and N. Smith, CC0) at equal steps.
const INFERNO: [Colour; 9] = [
    [0, 0, 4],
    [31, 12, 72],
    [85, 15, 109],
    [136, 34, 106],
    [186, 54, 85],
    [227, 89, 51],
    [249, 140, 10],
    [249, 201, 50],
    [252, 255, 164],
];

/// An image whose map is drawn.
pub struct Drawing<'a> {
    /// Its name.
    pub name: &'a str,
    /// As the model sees it, see [`seen`].
    pub image: &'a Image,
    /// The map.
    pub map: &'a PoolingMap,
    /// What the model pools by.
    pub pool: PoolKind,
    /// The most probable class.
    pub top: Option<&'a Scored>,
    /// Whether each head is shown too.
    pub heads: bool,
}

/// What a model sees of an image when it is evaluated at `resolution` (0: the recipe's), in as many pixels as are drawn: its
/// patches, and nothing beside them.
///
/// # Errors
/// An image that cannot be read, or changed since the model ran over it.
pub fn seen(
    source: &dyn Source,
    sample: usize,
    recipe: &Recipe,
    resolution: usize,
    map: &PoolingMap,
) -> Result<Image> {
    let settings = PackingSettings::eval(recipe, resolution)?;
    let draw = Draw { epoch: 0, sample: sample as u64, seen: 0 };
    let mut plan = settings.plan(draw, source.size(sample)?);
    let grid = plan.target.grid;
    if (grid.rows, grid.cols) != (map.rows, map.cols) {
        return Err(Error::failure(format!("{}: the file has changed meanwhile", source.name(sample))));
    }
    let factor = SIDE.div_ceil(plan.target.height.max(plan.target.width)).max(1);
    enlarge(&mut plan, factor);
    let image = Viewer::new(source, ViewSettings::eval(recipe)).view(&plan)?;
    let (height, width) = (grid.rows * recipe.model.patch * factor, grid.cols * recipe.model.patch * factor);
    let rows = image.pixels.chunks_exact(image.width * image.channels).take(height);
    let pixels = rows.flat_map(|row| &row[..width * image.channels]).copied().collect();
    Ok(Image { height, width, channels: image.channels, pixels })
}

/// The same part of the image in `factor` times as many rows and columns.
fn enlarge(plan: &mut PlannedImage, factor: usize) {
    plan.target.height *= factor;
    plan.target.width *= factor;
    if let Frame::Cut { height, width, top, left } = &mut plan.frame {
        (*height, *width) = (*height * factor, *width * factor);
        (*top, *left) = (*top * factor as isize, *left * factor as isize);
    }
}

/// The picture.
pub fn draw(drawing: &Drawing<'_>) -> Canvas {
    let Drawing { image, map, .. } = *drawing;
    let (height, width) = fitted(image, SIDE, SIDE);
    let heads = if drawing.heads { map.heads.len() } else { 0 };
    let (head_height, head_width) = fitted(image, HEAD_SIDE, HEAD_SIDE);
    let columns = COLUMNS.min(heads);
    let below = (columns * (head_width + SPACE)).saturating_sub(SPACE);
    let inner = (2 * width + SPACE).max(below).max(LEAST_WIDTH);
    let top = MARGIN + 44;
    let legend = top + height + SPACE;
    let first_head = legend + BAR + 4 * SPACE;
    let head_pitch = head_height + 20 + SPACE;
    let bottom = match heads {
        0 => legend + BAR + 2 * SPACE + 4,
        heads => first_head + heads.div_ceil(columns) * head_pitch - SPACE,
    };
    let mut canvas = Canvas::new(inner + 2 * MARGIN, bottom + MARGIN);
    let dim = mix(INK, GROUND, 0.6);

    let title = drawing.top.map_or_else(String::new, |top| {
        let probability = percent(top.probability as f32);
        format!("{} {probability}", shortened(&top.class, inner, 2, probability.len() + 1))
    });
    canvas.text((MARGIN, MARGIN), 2, &title.to_lowercase(), INK);
    let name = shortened(drawing.name, inner, 1, 0);
    canvas.text((MARGIN, MARGIN + 24), 1, &name.to_lowercase(), dim);

    canvas.picture(image, (MARGIN, top), (height, width));
    let mean = map.mean();
    let right = MARGIN + width + SPACE;
    let range = overlay(&mut canvas, image, (&mean, map), (right, top), (height, width));

    let what = match drawing.pool {
        PoolKind::Cls => "class token, last block",
        _ => "attention pooling",
    };
    let told = format!(
        "{what}: {}, {}x{} patches{}",
        if map.heads.len() == 1 { "one head".into() } else { format!("mean of {} heads", map.heads.len()) },
        map.rows,
        map.cols,
        if map.prefix > 0.0 {
            format!(", prefix tokens {}", percent(map.prefix as f32))
        } else {
            String::new()
        }
    );
    bar(&mut canvas, (MARGIN, legend), inner.min(2 * width + SPACE).max(LEAST_WIDTH), range, map.uniform());
    canvas.text((MARGIN, legend + BAR + 2 * SPACE - 4), 1, &told, dim);

    for (index, head) in map.heads.iter().enumerate().take(heads) {
        let x = MARGIN + index % columns * (head_width + SPACE);
        let y = first_head + index / columns * head_pitch;
        let range = overlay(&mut canvas, image, (head, map), (x, y + 18), (head_height, head_width));
        let told = shortened(&format!("head {index}: to {}", percent(range.1)), head_width, 1, 0);
        canvas.text((x, y), 1, &told, dim);
    }
    canvas
}

/// A map over the grey image; returns its least and largest value, to which the colours reach.
fn overlay(
    canvas: &mut Canvas,
    image: &Image,
    (values, map): (&[f32], &PoolingMap),
    corner: (usize, usize),
    (height, width): (usize, usize),
) -> (f32, f32) {
    let range =
        values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &p| (low.min(p), high.max(p)));
    let Ok(shown) = crate::data::view::resized(image.clone(), (height, width)) else { return range };
    canvas.paint(corner, (width, height), |x, y| {
        let at = |pixel: usize, pixels: usize, patches: usize| {
            (pixel as f32 + 0.5) / pixels as f32 * patches as f32 - 0.5
        };
        let value = interpolated(values, map, at(y, height, map.rows), at(x, width, map.cols));
        let [r, g, b] = shown.colour(x, y).map(f64::from);
        let grey = (0.299 * r + 0.587 * g + 0.114 * b).round() as u8;
        mix(heat(share(value, range)), [grey; 3], COVER)
    });
    range
}

/// Where a value lies between the least and the largest, from 0 to 1.
fn share(value: f32, (low, high): (f32, f32)) -> f64 {
    if high > low { f64::from((value - low) / (high - low)) } else { 0.5 }
}

/// Bilinear between the centres of patches; beyond the outermost their values go on.
fn interpolated(values: &[f32], map: &PoolingMap, row: f32, col: f32) -> f32 {
    let place = |at: f32, count: usize| {
        let at = at.clamp(0.0, (count - 1) as f32);
        let first = at as usize;
        (first, (first + 1).min(count - 1), at - first as f32)
    };
    let ((top, bottom, down), (left, right, across)) = (place(row, map.rows), place(col, map.cols));
    let along = |row: usize| {
        let (a, b) = (values[row * map.cols + left], values[row * map.cols + right]);
        a + across * (b - a)
    };
    let (above, below) = (along(top), along(bottom));
    above + down * (below - above)
}

/// The colour of a share from 0 to 1.
fn heat(share: f64) -> Colour {
    let at = share.clamp(0.0, 1.0) * (INFERNO.len() - 1) as f64;
    let first = (at as usize).min(INFERNO.len() - 2);
    mix(INFERNO[first + 1], INFERNO[first], at - first as f64)
}

/// Colours from the least to the largest probability of a patch, named, and where `uniform` attention would lie.
fn bar(canvas: &mut Canvas, at: (usize, usize), width: usize, range: (f32, f32), uniform: f32) {
    canvas.paint(at, (width, BAR), |x, _| heat(x as f64 / (width - 1).max(1) as f64));
    let y = at.1 + BAR + 5;
    let [low, even, high] = [range.0, uniform, range.1].map(percent);
    canvas.text((at.0, y), 1, &low, INK);
    canvas.text((at.0 + width - text_width(&high), y), 1, &high, INK);
    let even = format!("uniform {even}");
    let mark = at.0 + (share(uniform, range).clamp(0.0, 1.0) * width as f64) as usize;
    let (left, right) = (at.0 + text_width(&low) + 12, at.0 + width - text_width(&high) - 12);
    if left + text_width(&even) <= right && range.0 < range.1 {
        canvas.paint((mark.min(at.0 + width - 2), at.1 - 3), (2, BAR + 6), |_, _| INK);
        let x = mark.saturating_sub(text_width(&even) / 2).clamp(left, right - text_width(&even));
        canvas.text((x, y), 1, &even, INK);
    }
}

/// Width of a text at scale 1.
fn text_width(text: &str) -> usize {
    text.chars().count() * (font::WIDTH + 1)
}

/// As much of `text` as fits into `width` beside `beside` other characters.
fn shortened(text: &str, width: usize, scale: usize, beside: usize) -> String {
    let most = (width / ((font::WIDTH + 1) * scale)).saturating_sub(beside);
    match text.chars().count() {
        count if count <= most => text.to_owned(),
        _ => text.chars().take(most.saturating_sub(2)).chain("..".chars()).collect(),
    }
}

/// Three digits.
fn percent(probability: f32) -> String {
    let percent = 100.0 * probability;
    match percent {
        10.0.. => format!("{percent:.1} %"),
        0.995.. => format!("{percent:.2} %"),
        _ => format!("{percent:.3} %"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(rows: usize, cols: usize) -> PoolingMap {
        PoolingMap { rows, cols, heads: vec![vec![0.0; rows * cols]], attended: rows * cols, prefix: 0.0 }
    }

    #[test]
    fn values_lie_at_the_centres_of_patches() {
        let values = [0.0, 1.0, 2.0, 4.0, 5.0, 6.0];
        let at = |row, col| interpolated(&values, &map(2, 3), row, col);
        assert_eq!([at(0.0, 0.0), at(1.0, 2.0), at(0.0, 1.0)], [0.0, 6.0, 1.0]);
        assert_eq!([at(0.5, 0.5), at(-0.5, -0.5), at(1.5, 2.5)], [2.5, 0.0, 6.0]);
        assert_eq!(interpolated(&[3.0], &map(1, 1), 0.2, -0.3), 3.0);
    }

    /// A map of 2 x 4 patches whose one hot patch is the last of the first row, over a black image.
    #[test]
    fn a_hot_patch_is_where_it_is_in_the_image() {
        let image = Image { height: 8, width: 16, channels: 1, pixels: vec![0; 128] };
        let mut map = map(2, 4);
        map.heads[0][3] = 1.0;
        let drawing =
            Drawing { name: "", image: &image, map: &map, pool: PoolKind::Map, top: None, heads: false };
        let canvas = draw(&drawing);
        // The map is beside the image, 480 x 240 pixels, below the title.
        let (left, top, patch) = (MARGIN + SIDE + SPACE, MARGIN + 44, 120);
        let at = |row: usize, col: usize| {
            canvas.pixel(left + col * patch + patch / 2, top + row * patch + patch / 2)
        };
        // Between centres that are no whole pixels.
        let bright = |[r, g, b]: Colour| u32::from(r) + u32::from(g) + u32::from(b);
        for (row, col) in (0..2).flat_map(|row| (0..4).map(move |col| (row, col))) {
            let found = bright(at(row, col));
            assert!(if (row, col) == (0, 3) { found > 400 } else { found < 40 }, "{row} {col}: {found}");
        }
    }

    #[test]
    fn colours_reach_from_the_least_to_the_largest() {
        assert_eq!((heat(0.0), heat(1.0), heat(0.5)), (INFERNO[0], INFERNO[8], INFERNO[4]));
        assert_eq!((share(2.0, (2.0, 4.0)), share(3.0, (2.0, 4.0)), share(1.0, (1.0, 1.0))), (0.0, 0.5, 0.5));
    }

    #[test]
    fn texts_fit() {
        assert_eq!(shortened("airplanes", 480, 2, 8), "airplanes");
        let long = shortened(&"x".repeat(100), 480, 2, 8);
        assert_eq!((long.len(), &long[30..]), (32, ".."));
        assert_eq!([0.5, 0.04321, 0.001234].map(percent), ["50.0 %", "4.32 %", "0.123 %"]);
    }
}
