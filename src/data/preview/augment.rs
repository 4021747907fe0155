//! Draws how training images are varied: each image twice, with the boxes that simple random crops and random resized
//! crops take out of it, and beside it what training sees of it in its first epochs.

use std::path::Path;

use super::canvas::{Canvas, Colour, GROUND, INK, fitted, mix, palette};
use super::font;
use crate::data::augment::Op;
use crate::data::draw::Draw;
use crate::data::frame::Framing;
use crate::data::order::Order;
use crate::data::packing::PackingSettings;
use crate::data::source::{Dataset, Image, Source};
use crate::data::view::{ViewSettings, Viewer};
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
            canvas.picture(pixels, corner, (height, width));
            for (line, text) in wrapped(caption, CELL / (font::WIDTH + 1)).iter().take(LINES).enumerate() {
                canvas.text((x, y + CELL + 4 + line * LINE), 1, text, dim);
            }
        }
    }
    canvas
}

/// The image with its boxes, in a cell with its corner at `at`.
fn original(canvas: &mut Canvas, row: &Row, boxes: &[[f64; 4]], at: (usize, usize)) {
    let (height, width) = (row.original.height as f64, row.original.width as f64);
    // Simple random crops reach over the edge of the image: there has to be room for them.
    let (mut low, mut high) = ([0.0f64; 2], [height, width]);
    for &[top, left, tall, wide] in boxes {
        low = [low[0].min(top), low[1].min(left)];
        high = [high[0].max(top + tall), high[1].max(left + wide)];
    }
    let [tall, wide] = [high[0] - low[0], high[1] - low[1]];
    let scale = ((CELL - 2 * FRAME) as f64 / tall).min((ORIGINAL - 2 * FRAME) as f64 / wide);
    let down = |y: f64| at.1 as f64 + CELL as f64 / 2.0 + (y - low[0] - tall / 2.0) * scale;
    let across = |x: f64| at.0 as f64 + ORIGINAL as f64 / 2.0 + (x - low[1] - wide / 2.0) * scale;
    let shown = [height, width].map(|pixels| ((pixels * scale).round() as usize).max(1));
    canvas.picture(&row.original, (across(0.0).round() as usize, down(0.0).round() as usize), shown.into());
    for (draw, &[top, left, tall, wide]) in boxes.iter().enumerate() {
        let edges = [across(left), down(top), across(left + wide), down(top + tall)];
        let edges = edges.map(|place| place.round() as usize);
        outline(canvas, edges, 2, mix(GROUND, palette(draw), 0.8));
        outline(canvas, edges, 1, palette(draw));
    }
}

/// A rectangle's edges (left, top, right, bottom), `2·reach` pixels wide.
fn outline(canvas: &mut Canvas, [left, top, right, bottom]: [usize; 4], reach: usize, colour: Colour) {
    let (wide, tall) = (right - left + 2 * reach, bottom - top + 2 * reach);
    for y in [top, bottom] {
        canvas.paint((left - reach, y - reach), (wide, 2 * reach), |_, _| colour);
    }
    for x in [left, right] {
        canvas.paint((x - reach, top - reach), (2 * reach, tall), |_, _| colour);
    }
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
