//! Pictures of a batch as the kernels want them described: `kernels/view/view.cuh`.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::axis::{Axis, Tap};

/// Most ops of a picture.
pub const MOST_OPS: usize = 8;
/// Bytes of a unit, to which everything in device memory is aligned.
const UNIT: usize = 16;
/// Columns of a tile, at most; then half of that, and so on, until what they need of a row fits [`MIDDLE`] bytes.
const TILE_COLUMNS: usize = 64;
pub(super) const TILE_ROWS: usize = 8;
/// Bytes of shared memory for a row of a tile.
pub(super) const MIDDLE: usize = 3072;

/// Bytes of sources that have room, as a multiple of those of as many patches as a batch has tokens.
const SOURCE: usize = 8;
/// The same of targets, which are whole however many of their patches are dropped.
const TARGET: usize = 4;

/// What is done to every pixel of a picture, in 8 bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// Blend with black: so much of the pixel.
    BlendBlack(f32),
    /// Blend with the mean luma of the picture.
    BlendMean(f32),
    /// Blend with the luma of the pixel; 0 makes it grey. For three channels.
    BlendLuma(f32),
    /// Values from here on are inverted.
    Solarize(u16),
    /// Bits that stay.
    Mask(u8),
    /// Added to values below 128.
    Add(u8),
}

impl Op {
    /// Kind and parameter.
    fn words(self) -> [i32; 2] {
        match self {
            Self::BlendBlack(factor) => [0, factor.to_bits() as i32],
            Self::BlendMean(factor) => [1, factor.to_bits() as i32],
            Self::BlendLuma(factor) => [2, factor.to_bits() as i32],
            Self::Solarize(threshold) => [3, threshold.into()],
            Self::Mask(bits) => [4, bits.into()],
            Self::Add(add) => [5, add.into()],
        }
    }
}

/// How a picture is mixed with its partner, the picture after it.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixed {
    /// So much of each pixel is its own.
    Blend(f32),
    /// These rows and columns are the partner's.
    Paste(Range<usize>, Range<usize>),
}

/// What the kernels read of a picture, mirror of `view::Field`. Parts are told in units of 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Record {
    height: i32,
    width: i32,
    pitch: i32,
    first_tile: i32,
    tile_columns: i32,
    row_taps: i32,
    column_taps: i32,
    weights: i32,
    source: i32,
    pixels: i32,
    row_shift: i32,
    column_shift: i32,
    ops: i32,
    partner: i32,
    share: i32,
    /// Top, bottom, left, right.
    region: [i32; 4],
    op: [[i32; 2]; MOST_OPS],
}

/// The pixels that a picture is made from, `[height, width, channels]`.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// All of them.
    pub pixels: &'a [u8],
    /// Pixels from one row to the next.
    pub width: usize,
    /// 1 or 3.
    pub channels: usize,
}

/// Room that a picture has, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// For its source and tables.
    pub bytes: usize,
    /// For its target.
    pub pixels: usize,
}

impl Shares {
    /// Those of one token in a batch of patches of `side` pixels a side, pictures mixed with others or not. Patches that
    /// the host has cut fit them always: [`Picture::new`] of a column of patches, one for each token.
    pub fn of_token(side: usize, channels: usize, mixed: bool) -> Self {
        let times = if mixed { 2 } else { 1 };
        let patch = channels * side * side;
        // A column of patches has a tap for each row and column, and rows of at least a unit.
        let tables = 32 * side + 4 * UNIT;
        Self { bytes: times * SOURCE * patch + tables, pixels: times * TARGET * patch + UNIT }
    }

    /// Those of so many tokens.
    pub fn of(self, tokens: usize) -> Self {
        Self { bytes: tokens * self.bytes, pixels: tokens * self.pixels }
    }

    /// Those of one of two that share them.
    pub fn half(self) -> Self {
        Self { bytes: self.bytes / 2, pixels: self.pixels / 2 }
    }
}

/// A picture: its source, how the target comes from it, and what is done to that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Parts and tiles are counted from the picture's own.
    record: Record,
    bytes: Vec<u8>,
    channels: usize,
}

impl Picture {
    /// The target whose rows and columns come from `source` as `rows` and `columns` say; of the source only what these
    /// need is kept. None where it exceeds `room`, or cannot be described: more than [`MOST_OPS`] ops, or single columns
    /// that need more of a row than the kernel has shared memory for.
    ///
    /// # Panics
    /// If rows or columns need pixels that the source does not have: a bug of the caller.
    pub fn new(source: Source<'_>, rows: &Axis, columns: &Axis, ops: &[Op], room: Shares) -> Option<Self> {
        let (channels, [height, width]) = (source.channels, [rows.taps.len(), columns.taps.len()]);
        let (down, along) = (Axis::needs(&rows.taps), Axis::needs(&columns.taps));
        let pitch = (along.len() * channels).next_multiple_of(UNIT);
        let taps = |axis: &Axis| (8 * axis.taps.len()).next_multiple_of(UNIT);
        let weights = (2 * (rows.weights.len() + columns.weights.len())).next_multiple_of(UNIT);
        let all = [taps(rows), taps(columns), weights, pitch * down.len()];
        let mut ends = [0; 4];
        all.iter().zip(&mut ends).fold(0, |sum, (part, end)| {
            *end = sum + part;
            *end
        });
        let tile_columns = tile_columns(&columns.taps, along.start, channels)?;
        let fits = ends[3] <= room.bytes
            && (height * width * channels).next_multiple_of(UNIT) <= room.pixels
            && ops.len() <= MOST_OPS
            && down.len().max(along.len()) < 1 << 16
            && ends[3] / UNIT < 1 << 31;
        if !fits {
            return None;
        }
        let mut bytes = Vec::with_capacity(ends[3]);
        let mut put_taps = |taps: &[Tap], from: usize, weights: usize| {
            for tap in taps {
                let pixels = (tap.first - from) as u32 | (tap.count as u32) << 16;
                bytes.extend_from_slice(bytemuck::bytes_of(&[pixels, (tap.weight + weights) as u32]));
            }
            bytes.resize(bytes.len().next_multiple_of(UNIT), 0);
        };
        put_taps(&rows.taps, down.start, 0);
        put_taps(&columns.taps, along.start, rows.weights.len());
        bytes.extend_from_slice(bytemuck::cast_slice(&rows.weights));
        bytes.extend_from_slice(bytemuck::cast_slice(&columns.weights));
        bytes.resize(ends[2], 0);
        let line = source.width * channels;
        for y in down {
            bytes.extend_from_slice(&source.pixels[y * line..][along.start * channels..along.end * channels]);
            bytes.resize(bytes.len().next_multiple_of(UNIT), 0);
        }
        let mut op = [[0; 2]; MOST_OPS];
        op.iter_mut().zip(ops).for_each(|(words, op)| *words = op.words());
        let unit = |bytes: usize| (bytes / UNIT) as i32;
        let record = Record {
            height: height as i32,
            width: width as i32,
            pitch: pitch as i32,
            tile_columns: tile_columns as i32,
            row_taps: 0,
            column_taps: unit(ends[0]),
            weights: unit(ends[1]),
            source: unit(ends[2]),
            row_shift: rows.places as i32,
            column_shift: columns.places as i32,
            ops: ops.len() as i32,
            op,
            ..Record::default()
        };
        Some(Self { record, bytes, channels })
    }

    /// The same mixed with the picture that comes after it, of the same size.
    pub fn mixed(mut self, how: &Mixed) -> Self {
        self.record.partner = 1;
        match how {
            Mixed::Blend(share) => self.record.share = share.to_bits() as i32,
            // A box of no rows says that there is none.
            Mixed::Paste(rows, columns) if rows.is_empty() || columns.is_empty() => {
                self.record.share = 1f32.to_bits() as i32;
            }
            Mixed::Paste(rows, columns) => {
                let sides = [rows.start, rows.end, columns.start, columns.end];
                self.record.region = sides.map(|side| side as i32);
            }
        }
        self
    }

    /// Bytes of its source and tables, whole units.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Height and width of its target.
    pub fn size(&self) -> (usize, usize) {
        (self.record.height as usize, self.record.width as usize)
    }

    /// 1 or 3.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Whether the picture after it is mixed into it.
    pub(super) fn has_partner(&self) -> bool {
        self.record.partner > 0
    }

    /// Bytes of its target, whole units.
    pub(super) fn target_bytes(&self) -> usize {
        let (height, width) = self.size();
        (height * width * self.channels).next_multiple_of(UNIT)
    }

    fn tiles(&self) -> usize {
        let (height, width) = self.size();
        height.div_ceil(TILE_ROWS) * width.div_ceil(self.record.tile_columns.max(1) as usize)
    }
}

/// Records of the pictures of a batch, whose bytes lie one after another, and the numbers of pictures and of tiles.
pub fn records(pictures: &[Picture]) -> (Vec<Record>, [i32; 2]) {
    let (mut data, mut pixels, mut tiles) = (0, 0, 0);
    let mut placed = |(i, picture): (usize, &Picture)| {
        let mut record = picture.record;
        for part in [&mut record.row_taps, &mut record.column_taps, &mut record.weights, &mut record.source] {
            *part += data;
        }
        (record.first_tile, record.pixels) = (tiles, pixels);
        if record.partner > 0 {
            record.partner = i as i32 + 2;
        }
        data += (picture.bytes.len() / UNIT) as i32;
        pixels += (picture.target_bytes() / UNIT) as i32;
        tiles += picture.tiles() as i32;
        record
    };
    let records = pictures.iter().enumerate().map(&mut placed).collect();
    (records, [pictures.len() as i32, tiles])
}

/// How many columns a tile may have so that what they need of a row that begins at `from` fits shared memory.
fn tile_columns(taps: &[Tap], from: usize, channels: usize) -> Option<usize> {
    let fits = |tile: &[Tap]| {
        let needs = Axis::needs(tile);
        let base = (needs.start - from) * channels / 4 * 4;
        ((needs.end - from) * channels - base).next_multiple_of(4) <= MIDDLE
    };
    let halves = std::iter::successors(Some(TILE_COLUMNS), |columns| Some(columns / 2));
    halves.take_while(|&columns| columns > 0).find(|&columns| taps.chunks(columns).all(fits))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Shares = Shares { bytes: 1 << 30, pixels: 1 << 30 };

    fn of(
        height: usize,
        width: usize,
        channels: usize,
        target: (usize, usize),
        room: Shares,
    ) -> Option<Picture> {
        let pixels = vec![7; height * width * channels];
        let rows = Axis::new(height, 0.0, height as f64, target.0);
        let columns = Axis::new(width, 0.0, width as f64, target.1);
        Picture::new(Source { pixels: &pixels, width, channels }, &rows, &columns, &[], room)
    }

    /// What the host has cut has room whatever the patches, for one token and for many.
    #[test]
    fn a_column_of_patches_always_fits() {
        for (side, channels) in [(1, 1), (1, 3), (2, 1), (7, 3), (14, 3), (16, 3), (32, 1)] {
            for kept in [1, 2, 5, 64] {
                let room = Shares::of_token(side, channels, false).of(kept);
                let picture = of(kept * side, side, channels, (kept * side, side), room);
                assert!(picture.is_some(), "{kept} patches of {channels}x{side}x{side}");
            }
        }
    }

    #[test]
    fn what_is_too_large_is_refused() {
        let whole = of(50, 40, 3, (16, 32), ROOM).unwrap();
        let (bytes, pixels) = (whole.bytes().len(), 16 * 32 * 3);
        assert_eq!(of(50, 40, 3, (16, 32), Shares { bytes, pixels }), Some(whole));
        assert_eq!(of(50, 40, 3, (16, 32), Shares { bytes: bytes - 1, pixels }), None);
        assert_eq!(of(50, 40, 3, (16, 32), Shares { bytes, pixels: pixels - 1 }), None);
        // One column needs 4 times the reduction of 3 channels.
        assert!(of(4, 2000, 3, (4, 16), ROOM).is_some() && of(4, 5000, 3, (4, 16), ROOM).is_none());
    }

    #[test]
    fn records_follow_one_another() {
        let one = of(20, 20, 3, (16, 16), ROOM).unwrap().mixed(&Mixed::Blend(0.25));
        let two = of(9, 30, 3, (16, 16), ROOM).unwrap();
        let (records, counts) = records(&[one.clone(), two.clone(), one.clone()]);
        assert_eq!(counts, [3, 6]);
        assert_eq!(records.iter().map(|r| r.partner).collect::<Vec<_>>(), [2, 0, 4]);
        assert_eq!(records.iter().map(|r| r.first_tile).collect::<Vec<_>>(), [0, 2, 4]);
        assert_eq!(records.iter().map(|r| r.pixels).collect::<Vec<_>>(), [0, 48, 96]);
        let units = |picture: &Picture| (picture.bytes().len() / 16) as i32;
        assert_eq!(records[2].source, units(&one) + units(&two) + records[0].source);
    }
}
