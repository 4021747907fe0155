//! Draws how a batch is packed: on the left the images as they were resized, on the right the
//! tokens that are left of them, in memory order, every image with a colour of its own.

mod augment;
pub(crate) mod canvas;
pub(crate) mod font;
mod picture;

pub use augment::augmentations;

use std::collections::BTreeMap;
use std::path::Path;

use self::canvas::{Canvas, GROUND, INK, mix, palette};
use self::picture::{Picture, load};
use crate::data::packing::{BatchPlan, PackingSettings, PackingStats};
use crate::data::planner::Planner;
use crate::data::source::Dataset;
use crate::error::{Error, Result};
use crate::recipe::{DropKind, PackingKind, Recipe};

/// Space around the picture and between its parts.
const MARGIN: usize = 28;
/// Space between two blocks of token rows.
const SPACE: usize = 12;
/// Height of the title and the legend.
const HEADER: usize = 78;
/// Width of the column of images.
const GALLERY: usize = 420;
/// Blocks that are drawn of a large batch.
const MAX_BLOCKS: usize = 20;
/// Tokens of a block in flat mode.
const FLAT_BLOCK: usize = 256;
/// Smallest height of a block, so that its images can be seen.
const MIN_BLOCK: usize = 54;

/// One token.
#[derive(Clone, Copy)]
enum Cell {
    Prefix { image: usize },
    Patch { image: usize, index: usize },
    Padding,
}

/// What is drawn together: a bin, or a stretch of a flat batch.
struct Block {
    cells: Vec<Cell>,
    /// Images that begin here.
    images: Vec<usize>,
}

/// Draws the first training batch of the recipe as a PNG at `out`. Images that cannot be decoded
/// are black, as they are in the batch. Fails like planning does, or when the file cannot be written.
pub fn preview(dataset: &Dataset, recipe: &Recipe, out: &Path) -> Result<()> {
    let settings = PackingSettings::train(recipe)?;
    let mut planner = Planner::new(dataset.train.clone(), settings.clone(), None)?;
    let plan =
        planner.next_batch()?.ok_or_else(|| Error::usage("the data set holds no images; check data.path"))?;
    let stats = PackingStats::of(&plan, &settings);

    let mut blocks = blocks(&plan, &settings);
    let all = blocks.len();
    blocks.truncate(MAX_BLOCKS);
    let mut pictures = BTreeMap::new();
    for cell in blocks.iter().flat_map(|block| &block.cells) {
        if let Cell::Prefix { image } | Cell::Patch { image, .. } = *cell {
            pictures
                .entry(image)
                .or_insert_with(|| load(dataset.train.as_ref(), recipe, &plan.images[image]));
        }
    }

    let (what, size) = match settings.packing.kind {
        PackingKind::Bins => ("bins", settings.packing.sequence),
        PackingKind::Flat => ("rows", FLAT_BLOCK.min(settings.packing.tokens)),
    };
    let mut title = format!(
        "{} images in {all} {what} of {size} tokens, {:.2} % padding",
        plan.images.len(),
        100.0 * stats.padding()
    );
    if stats.kept < stats.patches {
        title += &format!(", {:.0} % of patches dropped", 100.0 * stats.dropped());
    }
    if blocks.len() < all {
        title += &format!(", first {} {what} shown", blocks.len());
    }
    let picture = draw(&blocks, &pictures, &title, &settings);
    picture.save(out)
}

/// Cuts the batch into what is drawn together.
fn blocks(plan: &BatchPlan, settings: &PackingSettings) -> Vec<Block> {
    let length = match settings.packing.kind {
        PackingKind::Bins => settings.packing.sequence,
        PackingKind::Flat => settings.packing.tokens,
    };
    let mut blocks = Vec::new();
    let mut image = 0;
    for &bin in &plan.bins {
        let mut cells = Vec::with_capacity(length);
        for image in image..image + bin {
            let planned = &plan.images[image];
            cells.extend((0..settings.prefix).map(|_| Cell::Prefix { image }));
            let kept = settings.kept(planned);
            cells.extend(kept.into_iter().map(|index| Cell::Patch { image, index: index as usize }));
        }
        image += bin;
        cells.resize(length.max(cells.len()), Cell::Padding);
        let block = if settings.packing.kind == PackingKind::Bins { length } else { FLAT_BLOCK };
        let mut last = None;
        for cells in cells.chunks(block) {
            let mut images = Vec::new();
            for cell in cells {
                if let Cell::Prefix { image } | Cell::Patch { image, .. } = *cell
                    && last.is_none_or(|last| image > last)
                {
                    images.push(image);
                    last = Some(image);
                }
            }
            blocks.push(Block { cells: cells.to_vec(), images });
        }
    }
    blocks
}

/// Side of a drawn patch: the patch's own where that is easy to see, else a multiple or 16.
fn shown_side(patch: usize) -> usize {
    match patch {
        0..12 => patch.max(1) * 12usize.div_ceil(patch.max(1)),
        12..=20 => patch,
        _ => 16,
    }
}

fn draw(
    blocks: &[Block],
    pictures: &BTreeMap<usize, Picture>,
    title: &str,
    settings: &PackingSettings,
) -> Canvas {
    let inner = shown_side(settings.patch);
    // Every cell carries its image's colour around the pixels, like grout around a shard, and a
    // tinge of it over them: plain white patches of two images still differ.
    let side = inner + 2;
    let longest = blocks.iter().map(|block| block.cells.len()).max().unwrap_or(1);
    let columns = ((4.0 * (longest as f64).sqrt()).round() as usize).clamp(16, 64).min(longest.max(1));
    let lines = |block: &Block| block.cells.len().div_ceil(columns);
    let height = |block: &Block| (lines(block) * side).max(MIN_BLOCK);
    let total: usize = blocks.iter().map(|block| height(block) + SPACE).sum();
    let left = MARGIN + GALLERY + MARGIN;
    let width = (left + columns * side + MARGIN).max(1280);
    let mut canvas = Canvas::new(width, MARGIN + HEADER + total + MARGIN - SPACE);
    header(&mut canvas, title, settings, pictures);

    let mut top = MARGIN + HEADER;
    for block in blocks {
        gallery(&mut canvas, block, pictures, (MARGIN, top), height(block), settings.patch);
        let first = top + (height(block) - lines(block) * side) / 2;
        for (at, cell) in block.cells.iter().enumerate() {
            let corner = (left + at % columns * side, first + at / columns * side);
            match *cell {
                Cell::Padding => canvas.hatch(corner, side),
                Cell::Prefix { image } => canvas.prefix(corner, side, palette(image)),
                Cell::Patch { image, index } => {
                    canvas.paint(corner, (side, side), |_, _| palette(image));
                    if let Some(picture) = pictures.get(&image) {
                        let shard = picture.shard(index);
                        canvas.paint((corner.0 + 1, corner.1 + 1), (inner, inner), |dx, dy| {
                            mix(shard.sample((dx, dy), (inner, inner)), palette(image), 0.9)
                        });
                    }
                }
            }
        }
        top += height(block) + SPACE;
    }
    canvas
}

/// The images of a block side by side at one scale, right-aligned, framed in their colours;
/// dropped patches are dark.
fn gallery(
    canvas: &mut Canvas,
    block: &Block,
    pictures: &BTreeMap<usize, Picture>,
    (x, y): (usize, usize),
    height: usize,
    patch: usize,
) {
    let frame = 2;
    let shown: Vec<_> = block.images.iter().filter_map(|i| Some((*i, pictures.get(i)?))).collect();
    let wide: usize = shown.iter().map(|(_, p)| p.width).sum();
    let tall = shown.iter().map(|(_, p)| p.height).max().unwrap_or(1);
    let spent = shown.len() * (2 * frame + 6);
    let scale = (GALLERY.saturating_sub(spent) as f64 / wide.max(1) as f64)
        .min((height - 2 * frame) as f64 / tall as f64)
        .min(shown_side(patch) as f64 / patch as f64);
    let scaled = |pixels: usize| ((pixels as f64 * scale) as usize).max(1);
    let mut right = x + GALLERY;
    for (image, picture) in shown.into_iter().rev() {
        let (w, h) = (scaled(picture.width), scaled(picture.height));
        right = right.saturating_sub(w + 2 * frame);
        let corner = (right, y + (height - h - 2 * frame) / 2);
        canvas.paint(corner, (w + 2 * frame, h + 2 * frame), |_, _| palette(image));
        canvas.paint((corner.0 + frame, corner.1 + frame), (w, h), |dx, dy| {
            let colour = picture.sample((dx, dy), (w, h));
            let kept = picture.is_kept(dx * picture.width / w, dy * picture.height / h);
            if kept { colour } else { mix(colour, GROUND, 0.22) }
        });
        right = right.saturating_sub(6);
    }
}

/// Title, and a sample of every kind of cell with its name.
fn header(canvas: &mut Canvas, title: &str, settings: &PackingSettings, pictures: &BTreeMap<usize, Picture>) {
    canvas.text((MARGIN, MARGIN), 2, title, INK);
    let side = shown_side(settings.patch).clamp(12, 20) + 2;
    let (mut x, y) = (MARGIN, MARGIN + 30);
    let colour = palette(0);
    let mut item = |canvas: &mut Canvas, name: &str, cell: &dyn Fn(&mut Canvas, (usize, usize))| {
        cell(canvas, (x, y));
        x = canvas.text((x + side + 8, y + side / 2 - 7), 2, name, mix(INK, GROUND, 0.7)) + 24;
    };
    let shard = |share: f64| {
        move |canvas: &mut Canvas, at: (usize, usize)| {
            canvas.paint(at, (side, side), |_, _| colour);
            let inner = side - 2;
            canvas.paint((at.0 + 1, at.1 + 1), (inner, inner), |dx, dy| {
                let pixel = pictures.values().next().map_or(INK, |p| p.sample((dx, dy), (inner, inner)));
                mix(pixel, GROUND, share)
            });
        }
    };
    let drops = settings.drop.kind != DropKind::None;
    item(canvas, if drops { "kept patch" } else { "patch" }, &shard(1.0));
    if drops {
        item(canvas, "dropped patch", &shard(0.22));
    }
    if settings.prefix > 0 {
        item(canvas, "prefix token", &|canvas, at| canvas.prefix(at, side, colour));
    }
    item(canvas, "padding", &|canvas, at| canvas.hatch(at, side));
}
