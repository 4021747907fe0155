//! The built-in handwritten digits (see `DIGITS.md` for their origin and licence).

use std::io::Read;
use std::sync::Arc;

use super::memory::{self, Row};
use super::split::{Class, Sample, Split, Table};
use super::{Dataset, Image};
use crate::error::{Error, Result};

static CSV: &[u8] = include_bytes!("digits.csv.gz");

/// Side of the stored images.
const SIDE: usize = 8;
/// Value of full ink.
const INK: usize = 16;

pub(super) fn open(split: Split) -> Result<Dataset> {
    let mut text = String::new();
    let damaged =
        |cause: String| Error::failure(format!("the built-in digits are damaged ({cause}); build again"));
    flate2::read::GzDecoder::new(CSV).read_to_string(&mut text).map_err(|e| damaged(e.to_string()))?;
    let origin: Arc<str> = "built-in digits".into();
    let samples = text
        .lines()
        .enumerate()
        .map(|(row, line)| {
            let values: Vec<usize> = line
                .split(',')
                .map(|v| v.parse().map_err(|_| damaged(format!("line {} holds `{v}`", row + 1))))
                .collect::<Result<_>>()?;
            match values.split_last() {
                Some((&digit, grid)) if grid.len() == SIDE * SIDE && digit < 10 => Ok(Sample {
                    class: Class::Number(digit),
                    part: None,
                    place: Row {
                        image: crop(grid),
                        origin: origin.clone(),
                        row,
                        caption: Some(caption(digit, row)),
                    },
                }),
                _ => Err(damaged(format!("line {} has {} values", row + 1, values.len()))),
            }
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(memory::dataset(Table::new(&origin, samples, None, split)?, "built-in digits"))
}

/// What is said of the digits.
const CAPTIONS: [&str; 4] =
    ["a handwritten {}", "the digit {}", "a {} written by hand", "a small grey picture of the number {}"];
const WORDS: [&str; 10] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

/// One of the captions, with the digit as a number or as a word, in turn.
fn caption(digit: usize, row: usize) -> String {
    let name = if row.is_multiple_of(2) { digit.to_string() } else { WORDS[digit].into() };
    CAPTIONS[row / 2 % CAPTIONS.len()].replace("{}", &name)
}

/// The digit cropped to the bounding box of its ink, at least 2x2, scaled to 0..=255.
fn crop(grid: &[usize]) -> Image {
    let span = |has_ink: &dyn Fn(usize) -> bool| {
        let first = (0..SIDE).find(|&i| has_ink(i)).unwrap_or(0);
        let last = (0..SIDE).rfind(|&i| has_ink(i)).unwrap_or(0);
        let start = first.min(SIDE - 2);
        start..(last + 1).max(start + 2)
    };
    let rows = span(&|y| (0..SIDE).any(|x| grid[y * SIDE + x] > 0));
    let columns = span(&|x| (0..SIDE).any(|y| grid[y * SIDE + x] > 0));
    let pixels = rows
        .clone()
        .flat_map(|y| {
            columns.clone().map(move |x| ((grid[y * SIDE + x].min(INK) * 255 + INK / 2) / INK) as u8)
        })
        .collect();
    Image { height: rows.len(), width: columns.len(), channels: 1, pixels }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crop_keeps_the_ink_and_at_least_two_by_two() {
        let mut grid = [0; 64];
        grid[2 * 8 + 3] = 16;
        grid[5 * 8 + 3] = 8;
        let image = crop(&grid);
        assert_eq!((image.height, image.width), (4, 2));
        assert_eq!(image.pixels, [255, 0, 0, 0, 0, 0, 128, 0]);
        let mut corner = [0; 64];
        corner[63] = 1;
        assert_eq!(crop(&corner).pixels, [0, 0, 0, 16]);
        assert_eq!(crop(&[0; 64]).pixels, [0; 4]);
    }
}
