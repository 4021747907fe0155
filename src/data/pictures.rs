//! Images of which a device makes patches (`data.views = "device"`): the host decodes them and tells how; what it would do
//! itself is in [`view`](super::view), [`augment`], [`mix`](super::mix) and [`patchify`](super::patchify),
//! and the device's pixels are the same.
//!
//! Every image has room for so many bytes a token ([`Shares`]). One that is larger, or that has operations without a
//! kernel, is finished here and goes as a picture of its target's size; where that is too large as well, as when nearly all
//! of its patches are dropped, those that are kept go as a picture of their own.

use std::borrow::Cow;

use crate::data::augment;
use crate::data::batch::{PREFIX, Pictures};
use crate::data::frame::Frame;
use crate::data::mix::{How, Mix};
use crate::data::packing::PlannedImage;
use crate::data::source::Image;
use crate::data::view::{Line, check_box};
use crate::error::Result;
use crate::kernels::view::{Axis, Mixed, Op, Picture, Shares, Source, Views};
use crate::recipe::{Recipe, ViewsKind};

/// Rows of pixels of a picture of patches, about: a picture may have twice as many.
const HIGHEST: usize = 1 << 15;

/// What a device makes the patches of one image of.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// The image, and the one that is mixed into it, if any; nothing where it was never looked at.
    pub pictures: Vec<Picture>,
    /// Where the picture is the kept patches, row by row, how many there are in a row.
    pub cut: Option<usize>,
}

impl From<Vec<Picture>> for Seen {
    /// Of which patches are cut where they lie in the target.
    fn from(pictures: Vec<Picture>) -> Self {
        Self { pictures, cut: None }
    }
}

/// What memory is made for where a device makes the patches of a training of `recipe`, in batches of `slots` images.
pub fn views(recipe: &Recipe, slots: usize) -> Views {
    let (tokens, model) = (recipe.packing.tokens, &recipe.model);
    Views::new(tokens, slots, model.channels, model.patch, recipe.mix.is_on())
}

/// The recipe as its batches are loaded: for the CPU the host makes the patches, whatever `data.views` says.
pub fn loaded(recipe: &Recipe, on_device: bool) -> Cow<'_, Recipe> {
    if on_device || recipe.data.views == ViewsKind::Host {
        return Cow::Borrowed(recipe);
    }
    let mut loaded = recipe.clone();
    loaded.data.views = ViewsKind::Host;
    Cow::Owned(loaded)
}

/// How rows and columns of a planned image's target come from its pixels.
///
/// # Errors
/// An image that is smaller than was planned.
pub(super) fn axes(image: &Image, plan: &PlannedImage) -> Result<[Axis; 2]> {
    let (height, width) = (plan.target.height, plan.target.width);
    let whole = |source: usize, target| Axis::new(source, 0.0, source as f64, target);
    Ok(match plan.frame {
        Frame::Whole => [whole(image.height, height), whole(image.width, width)],
        Frame::Box(area) => {
            check_box(image, area)?;
            [whole(area.height, height).shifted(area.top), whole(area.width, width).shifted(area.left)]
        }
        Frame::Cut { height: full_height, width: full_width, top, left } => {
            let axis = |line: Line, source| {
                Axis::new(source, line.start, line.length, line.seen).chosen(&line.shown)
            };
            [
                axis(Line::new(top, height, full_height, image.height), image.height),
                axis(Line::new(left, width, full_width, image.width), image.width),
            ]
        }
    })
}

/// The operations as the device has them; none where it misses one.
pub(super) fn ops(ops: &[augment::Op], channels: usize) -> Option<Vec<Op>> {
    let colours = |factor| (channels == 3).then_some(Op::BlendLuma(factor));
    let mut there = Vec::with_capacity(ops.len());
    for op in ops {
        there.extend(match *op {
            augment::Op::Grayscale => colours(0.0),
            augment::Op::Saturation(factor) => colours(factor as f32),
            augment::Op::Brightness(factor) => Some(Op::BlendBlack(factor as f32)),
            augment::Op::Contrast(factor) => Some(Op::BlendMean(factor as f32)),
            augment::Op::Solarize(threshold) => Some(Op::Solarize(threshold)),
            augment::Op::Invert => Some(Op::Solarize(0)),
            augment::Op::Posterize(bits) => Some(Op::Mask(!0xFFu8.checked_shr(bits).unwrap_or(0))),
            augment::Op::SolarizeAdd(add) => Some(Op::Add(add)),
            _ => return None,
        });
    }
    Some(there)
}

/// The pixels of an image.
pub(super) fn source(image: &Image) -> Source<'_> {
    Source { pixels: &image.pixels, width: image.width, channels: image.channels }
}

/// An image as it is, where it has room.
pub(super) fn whole(image: &Image, room: Shares) -> Option<Picture> {
    let (rows, columns) = (Axis::copied(0..image.height), Axis::copied(0..image.width));
    Picture::new(source(image), &rows, &columns, &[], room)
}

/// The patches `kept` of an image that is finished, or as many of zeros: one below the other, or in several columns where
/// that would be higher than a picture can be. None where even these have no room, which [`Shares::of_token`] rules out.
pub(super) fn cut(
    image: Option<&Image>,
    plan: &PlannedImage,
    kept: &[u32],
    (side, channels): (usize, usize),
) -> Option<Seen> {
    let across = (kept.len() * side).div_ceil(HIGHEST).max(1);
    let (height, width) = (kept.len().div_ceil(across) * side, across * side);
    let mut pixels = vec![0; height * width * channels];
    for (i, &index) in kept.iter().enumerate() {
        let Some(image) = image else { break };
        let (row, column) = (index as usize / plan.target.grid.cols, index as usize % plan.target.grid.cols);
        for y in 0..side {
            let from = ((row * side + y) * image.width + column * side) * channels;
            let to = ((i / across * side + y) * width + i % across * side) * channels;
            let line = side * channels;
            pixels[to..to + line].copy_from_slice(&image.pixels[from..from + line]);
        }
    }
    let room = Shares::of_token(side, channels, false).of(kept.len());
    let picture = whole(&Image { height, width, channels, pixels }, room)?;
    Some(Seen { pictures: vec![picture], cut: Some(across) })
}

/// How a picture is mixed with its partner.
pub(super) fn mixed(mix: &Mix) -> Mixed {
    match &mix.how {
        How::Blend(share) => Mixed::Blend(*share),
        How::Paste(region) => Mixed::Paste(region.rows.clone(), region.cols.clone()),
    }
}

/// The pictures of a batch, of each image in turn, and where the patch of every token lies.
pub(super) fn gather(seen: Vec<Seen>, cu_seqlens: &[i32], positions: &[[u16; 2]], shape: Views) -> Pictures {
    let side = shape.side as i32;
    let (mut pictures, mut rows) = (Vec::new(), vec![[0; 3]; shape.tokens]);
    for (Seen { pictures: own, cut }, bounds) in seen.into_iter().zip(cu_seqlens.windows(2)) {
        if own.is_empty() {
            continue;
        }
        let number = pictures.len() as i32 + 1;
        let tokens = bounds[0] as usize..bounds[1] as usize;
        let patches = positions[tokens.clone()].iter().zip(&mut rows[tokens]);
        let patches = patches.filter(|(position, _)| **position != PREFIX);
        for (i, (&[row, column], place)) in patches.enumerate() {
            *place = match cut {
                Some(across) => [number, (i / across) as i32 * side, (i % across) as i32 * side],
                None => [number, i32::from(row) * side, i32::from(column) * side],
            };
        }
        pictures.extend(own);
    }
    Pictures { pictures: pictures.into(), rows, shape }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::resolution::{Grid, Target};

    /// A column of all of them would be higher than a picture can be.
    #[test]
    fn patches_of_a_large_image_stand_in_several_columns() {
        let (side, grid) = (16, Grid { rows: 80, cols: 80 });
        let (height, width) = (grid.rows * side, grid.cols * side);
        let pixels = (0..height * width).map(|i| (i * 31 % 251) as u8).collect();
        let image = Image { height, width, channels: 1, pixels };
        let kept: Vec<u32> = (0..6400).filter(|i| i % 5 > 0).collect();
        let plan = PlannedImage {
            sample: 0,
            epoch: 0,
            seen: 0,
            size: (height, width),
            frame: Frame::Whole,
            target: Target { height, width, grid, downscaled: false },
            kept: kept.len(),
            tokens: kept.len(),
            fitted: false,
        };
        let seen = cut(Some(&image), &plan, &kept, (side, 1)).unwrap();
        let across = seen.cut.unwrap();
        assert!(across > 1 && kept.len() * side > 1 << 16);
        let (height, width) = seen.pictures[0].size();
        assert_eq!((height, width), (kept.len().div_ceil(across) * side, across * side));
        let mut want = vec![0; height * width];
        for (i, &patch) in kept.iter().enumerate() {
            for (y, x) in (0..side).flat_map(|y| (0..side).map(move |x| (y, x))) {
                let from = (patch as usize / 80 * side + y) * image.width + patch as usize % 80 * side + x;
                want[(i / across * side + y) * width + i % across * side + x] = image.pixels[from];
            }
        }
        let room = Shares { bytes: usize::MAX, pixels: usize::MAX };
        let want = whole(&Image { height, width, channels: 1, pixels: want }, room);
        assert_eq!(seen.pictures.first(), want.as_ref());
        // What cannot be read is as large.
        assert_eq!(cut(None, &plan, &kept, (side, 1)).unwrap().pictures[0].size(), (height, width));
    }
}
