//! Draws how training images are varied: each image twice, with the boxes that simple random crops and random resized
//! crops take out of it, and beside it what training sees of it in its first epochs.

use std::path::Path;

use super::canvas::{Canvas, Colour, GROUND, INK, mix, palette};
use super::font;
use crate::data::augment::Op;
use crate::data::draw::Draw;
use crate::data::frame::Framing;
use crate::data::order::Order;
use crate::data::packing::PackingSettings;
use crate::data::source::{Dataset, Image, Source};
use crate::data::view::{ViewSettings, Viewer, resized};
use crate::error::{Error, Result};
use crate::recipe::{CropKind, Recipe};

/// Images that are shown.
const ROWS: usize = 6;
/// Times that each is drawn.
const DRAWS: usize = 5;
const MARGIN: usize = 28;
const SPACE: usize = 14;
/// Height of everything above the first row.
const HEADER: usize = 86;
/// Width of an original's cell.
const ORIGINAL: usize = 260;
/// Side of a result's cell, and the height of a row without its captions.
const CELL: usize = 188;
/// Room around an original for crops that reach over its edge.
const EDGE: usize = 8;
/// Lines of a caption.
const LINES: usize = 3;
/// Height of a line of a caption.
const LINE: usize = font::HEIGHT + 3;
/// Width of a frame.
const FRAME: usize = 3;

/// Draws the sheet as a PNG at `out`. Images that cannot be read are left out. Fails on a recipe that is not valid, where
/// no image can be read, and where the file cannot be written.
pub fn augmentations(dataset: &Dataset, recipe: &Recipe, name: &str, out: &Path) -> Result<()> {
    let settings = PackingSettings::train(recipe)?;
    let view = ViewSettings::train(recipe);
    let source = dataset.train.as_ref();
    let mut rows = Vec::new();
    if !source.is_empty() {
        // A sample is drawn `repeats` times in a row; each is shown once.
        let order = Order::new(source.len(), Some(settings.seed), 0, 1);
        for place in 0..source.len() {
            if rows.len() == ROWS {
                break;
            }
            let sample = order.draw(place, 0).sample;
            rows.extend(Row::read(source, &settings, &view, recipe, sample));
        }
    }
    if rows.is_empty() {
        return Err(Error::usage("none of the images can be read; check data.path"));
    }
    draw(&rows, recipe, name).save(out)
}

/// An image and what becomes of it.
struct Row {
    original: Image,
    /// (top, left, height, width) in its pixels: those of simple random crops and of random resized crops.
    boxes: [Vec<[f64; 4]>; 2],
    results: Vec<(Image, String)>,
}

impl Row {
    fn read(
        source: &dyn Source,
        settings: &PackingSettings,
        view: &ViewSettings,
        recipe: &Recipe,
        sample: u64,
    ) -> Option<Self> {
        let original = source.load(sample as usize, view.channels).ok()?;
        let size = (original.height, original.width);
        let augment = &recipe.augment;
        let framings = [
            Framing::Simple { padding: augment.padding },
            Framing::RandomResized { scale: augment.scale, ratio: augment.ratio },
        ];
        let boxes = framings.map(|framing| {
            let settings = PackingSettings { framing, ..settings.clone() };
            let planned = (0..DRAWS as u64).map(|epoch| settings.plan(Draw { epoch, sample, seen: 0 }, size));
            planned.map(|image| image.frame.seen(size, &image.target)).collect()
        });
        let mut viewer = Viewer::new(source, view.clone());
        let results = (0..DRAWS as u64).map(|epoch| {
            let pixels = viewer.view(&settings.plan(Draw { epoch, sample, seen: 0 }, size)).ok()?;
            let flip = view.flips(epoch, sample).then(|| "mirrored".to_owned());
            let ops = view.augment.draw(view.seed, epoch, sample);
            let caption = flip.into_iter().chain(ops.iter().map(named)).collect::<Vec<_>>().join(", ");
            Some((pixels, caption))
        });
        let results = results.collect::<Option<_>>()?;
        Some(Self { original, boxes, results })
    }
}

/// An operation in a few letters that the font has.
fn named(op: &Op) -> String {
    match *op {
        Op::Grayscale => "grey".into(),
        Op::Solarize(threshold) => format!("solarise {threshold}"),
        Op::GaussianBlur(radius) => format!("blur {radius:.1}"),
        Op::Brightness(factor) => format!("brightness {factor:.2}"),
        Op::Contrast(factor) => format!("contrast {factor:.2}"),
        Op::Saturation(factor) => format!("saturation {factor:.2}"),
        Op::Sharpness(factor) => format!("sharpness {factor:.2}"),
        Op::AutoContrast => "autocontrast".into(),
        Op::Equalize => "equalise".into(),
        Op::Invert => "invert".into(),
        Op::Posterize(bits) => format!("posterise {bits}"),
        Op::SolarizeAdd(add) => format!("solarise add {add}"),
        Op::Rotate(degrees) => format!("rotate {degrees:.0}"),
        Op::ShearX(factor) => format!("shear x {factor:.2}"),
        Op::ShearY(factor) => format!("shear y {factor:.2}"),
        Op::TranslateX(share) => format!("translate x {share:.2}"),
        Op::TranslateY(share) => format!("translate y {share:.2}"),
    }
}

fn draw(rows: &[Row], recipe: &Recipe, name: &str) -> Canvas {
    let results = MARGIN + 2 * (ORIGINAL + SPACE);
    let width = results + DRAWS * (CELL + SPACE) - SPACE + MARGIN;
    let row_height = CELL + 2 + LINES * LINE + SPACE;
    let mut canvas = Canvas::new(width, MARGIN + HEADER + rows.len() * row_height - SPACE + MARGIN);
    let dim = mix(INK, GROUND, 0.6);
    let title = format!("how training on {} varies images", name.to_lowercase());
    canvas.text((MARGIN, MARGIN), 2, &title, INK);
    let y = MARGIN + 38;
    let crop = recipe.augment.crop;
    let kinds = [(CropKind::Simple, "simple random crop"), (CropKind::RandomResized, "random resized crop")];
    for (i, (kind, heading)) in kinds.into_iter().enumerate() {
        let x = MARGIN + i * (ORIGINAL + SPACE);
        canvas.text((x, y), 2, heading, if crop == kind { INK } else { dim });
        let used = if crop == kind { "this recipe crops so" } else { "for comparison" };
        canvas.text((x, y + 24), 1, used, dim);
    }
    canvas.text((results, y), 2, "what training sees in five draws", INK);
    let told = match crop {
        CropKind::None => "the whole image, resized",
        _ => "frames have the colours of the boxes",
    };
    canvas.text((results, y + 24), 1, told, dim);

    for (i, row) in rows.iter().enumerate() {
        let y = MARGIN + HEADER + i * row_height;
        for (column, boxes) in row.boxes.iter().enumerate() {
            original(&mut canvas, row, boxes, (MARGIN + column * (ORIGINAL + SPACE), y));
        }
        for (draw, (pixels, caption)) in row.results.iter().enumerate() {
            let x = results + draw * (CELL + SPACE);
            let (height, width) = fitted(pixels, CELL - 2 * FRAME, CELL - 2 * FRAME);
            let corner = (x + (CELL - width) / 2, y + (CELL - height) / 2);
            if crop != CropKind::None {
                let around = (corner.0 - FRAME, corner.1 - FRAME);
                canvas.paint(around, (width + 2 * FRAME, height + 2 * FRAME), |_, _| palette(draw));
            }
            picture(&mut canvas, pixels, corner, (height, width));
            for (line, text) in wrapped(caption, CELL / (font::WIDTH + 1)).iter().take(LINES).enumerate() {
                canvas.text((x, y + CELL + 4 + line * LINE), 1, text, dim);
            }
        }
    }
    canvas
}

/// The image with its boxes, in a cell with its corner at `at`.
fn original(canvas: &mut Canvas, row: &Row, boxes: &[[f64; 4]], at: (usize, usize)) {
    let (height, width) = fitted(&row.original, CELL - 2 * EDGE, ORIGINAL - 2 * EDGE);
    let corner = (at.0 + (ORIGINAL - width) / 2, at.1 + (CELL - height) / 2);
    picture(canvas, &row.original, corner, (height, width));
    let scale = height as f64 / row.original.height as f64;
    for (draw, &[top, left, high, wide]) in boxes.iter().enumerate() {
        let place = |pixels: f64, from: usize| (from as f64 + pixels * scale).round() as isize;
        let (top, bottom) = (place(top, corner.1), place(top + high, corner.1));
        let (left, right) = (place(left, corner.0), place(left + wide, corner.0));
        let edges = [left, top, right, bottom];
        outline(canvas, edges, 2, mix(GROUND, palette(draw), 0.8), (at, (ORIGINAL, CELL)));
        outline(canvas, edges, 1, palette(draw), (at, (ORIGINAL, CELL)));
    }
}

/// A rectangle's edges (left, top, right, bottom), `2·reach` pixels wide, within `room` (corner, size).
fn outline(
    canvas: &mut Canvas,
    [left, top, right, bottom]: [isize; 4],
    reach: isize,
    colour: Colour,
    (corner, size): ((usize, usize), (usize, usize)),
) {
    let across = |x: isize| x.clamp(corner.0 as isize, (corner.0 + size.0) as isize) as usize;
    let down = |y: isize| y.clamp(corner.1 as isize, (corner.1 + size.1) as isize) as usize;
    let mut fill = |x0: isize, y0: isize, x1: isize, y1: isize| {
        let (x0, y0, x1, y1) = (across(x0), down(y0), across(x1), down(y1));
        canvas.paint((x0, y0), (x1 - x0, y1 - y0), |_, _| colour);
    };
    for y in [top, bottom] {
        fill(left - reach, y - reach, right + reach, y + reach);
    }
    for x in [left, right] {
        fill(x - reach, top - reach, x + reach, bottom + reach);
    }
}

/// (height, width) of the image at the largest scale that fits.
fn fitted(image: &Image, height: usize, width: usize) -> (usize, usize) {
    let scale = (height as f64 / image.height as f64).min(width as f64 / image.width as f64);
    let scaled = |pixels: usize, most: usize| ((pixels as f64 * scale).round() as usize).clamp(1, most);
    (scaled(image.height, height), scaled(image.width, width))
}

fn picture(canvas: &mut Canvas, image: &Image, corner: (usize, usize), size: (usize, usize)) {
    let Ok(shown) = resized(image.clone(), size) else { return };
    canvas.paint(corner, (shown.width, shown.height), |x, y| {
        let pixel = &shown.pixels[(y * shown.width + x) * shown.channels..][..shown.channels];
        std::array::from_fn(|channel| pixel[channel % shown.channels])
    });
}

/// Lines of at most `most` characters, broken at spaces behind commas.
fn wrapped(text: &str, most: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for part in text.split_inclusive(", ") {
        match lines.last_mut() {
            Some(line) if line.len() + part.trim_end().len() <= most => line.push_str(part),
            _ => lines.push(part.to_owned()),
        }
    }
    lines
}
