//! Where the tensors of an arena lie in the matrices whose rows and columns Adafactor sums, as tables of the kernels.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::super::arena::Arena;
use super::super::instances::THREADS;
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 64;
/// Columns of a tile.
pub(super) const TILE_COLUMNS: usize = 256;
/// Lines of a block.
const LINES: usize = THREADS as usize;

/// What is kept of the second moments of a whole parameter, one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WholeSpec {
    /// One number for each element.
    Elements(usize),
    /// Means over rows, and then over columns, of a matrix of so many.
    Matrix([usize; 2]),
}

impl WholeSpec {
    /// How many numbers.
    pub fn len(self) -> usize {
        match self {
            Self::Elements(len) => len,
            Self::Matrix([rows, columns]) => rows + columns,
        }
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// A tensor of an arena, and the places of what is kept for it, counted from the first number of the first whole
/// parameter. What lies in padding has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lines {
    /// What lies between tensors.
    None,
    /// Of each element.
    Elements(Vec<Option<usize>>),
    /// Elements of a matrix.
    Matrix {
        /// Which, in rows of as many elements as there are columns.
        elements: Range<usize>,
        /// Of each row that has such elements.
        rows: Vec<Option<usize>>,
        /// Of each column.
        columns: Vec<Option<usize>>,
    },
}

/// A tensor on the device, mirror of `OptimFactored`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct FactoredEntry {
    base: i64,
    first: i64,
    last: i64,
    columns: i32,
    rows: i32,
    row: i32,
    tile_columns: i32,
    first_tile: i32,
    first_line: i32,
    column_lines: i32,
    kind: i32,
    unused: [i32; 2],
}

/// A whole parameter on the device, mirror of `OptimWhole`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct WholeEntry {
    first: i32,
    rows: i32,
    columns: i32,
    unused: i32,
}

/// Tables for the tensors of an [`Arena`].
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    tensors: Vec<FactoredEntry>,
    wholes: Vec<WholeEntry>,
    tile_tensors: Vec<i32>,
    line_tensors: Vec<i32>,
    places: Vec<i32>,
    len: usize,
}

impl Statistics {
    /// For the tensors of `arena`, whose `lines` are given, and all parameters of the model.
    ///
    /// # Errors
    /// Other tensors than those of the arena; places that are none; more tiles or numbers than the kernels count, 2^31.
    pub fn new(arena: &Arena, lines: &[Lines], wholes: &[WholeSpec]) -> Result<Self> {
        let len: usize = wholes.iter().map(|whole| whole.len()).sum();
        let mut all = Self {
            tensors: Vec::with_capacity(lines.len()),
            wholes: Vec::with_capacity(wholes.len()),
            tile_tensors: Vec::new(),
            line_tensors: Vec::new(),
            places: Vec::new(),
            len: len.next_multiple_of(8),
        };
        let fits = |n: usize| i32::try_from(n).is_ok();
        if !fits(len) {
            return Err(Error::usage(format!(
                "the second moments are {len} numbers, more than 2^31 - 1; use a smaller model, or matrices of at least 32 \
                 rows and columns"
            )));
        }
        let mut first = 0;
        for whole in wholes {
            let [rows, columns] = match *whole {
                WholeSpec::Elements(len) => [0, len],
                WholeSpec::Matrix(shape) => shape,
            };
            let [rows, columns] = [rows, columns].map(|n| n as i32);
            all.wholes.push(WholeEntry { first, rows, columns, unused: 0 });
            first += whole.len() as i32;
        }
        if lines.len() != arena.ranges().len() {
            return Err(Error::usage(format!(
                "rows and columns of {} tensors are given for an arena of {}",
                lines.len(),
                arena.ranges().len()
            )));
        }
        for (tensor, (range, lines)) in arena.ranges().iter().zip(lines).enumerate() {
            all.push(tensor, range, lines)?;
        }
        match fits(all.tile_tensors.len()) && fits(all.places.len()) {
            true => Ok(all),
            false => Err(Error::usage("the gradients have more than 2^31 - 1 tiles, rows or columns")),
        }
    }

    fn push(&mut self, tensor: usize, range: &Range<usize>, lines: &Lines) -> Result<()> {
        let none: &[Option<usize>] = &[];
        let (elements, rows, columns) = match lines {
            Lines::None => {
                self.tensors.push(FactoredEntry::default());
                return Ok(());
            }
            Lines::Elements(places) => (0..places.len(), none, places.as_slice()),
            Lines::Matrix { elements, rows, columns } => {
                (elements.clone(), rows.as_slice(), columns.as_slice())
            }
        };
        let matrix = matches!(lines, Lines::Matrix { .. });
        let row = elements.start / columns.len().max(1);
        let touched = elements.end.div_ceil(columns.len().max(1)) - row;
        let known = rows.iter().chain(columns).flatten().all(|&place| place < self.len);
        if elements.len() != range.len() || matrix && touched != rows.len() || !known {
            return Err(Error::usage(format!(
                "tensor {tensor} of {} elements is given {} rows and {} columns of elements {elements:?}; give those \
                 that it has, with places below {}",
                range.len(),
                rows.len(),
                columns.len(),
                self.len
            )));
        }
        let tile_columns = columns.len().div_ceil(TILE_COLUMNS);
        let column_lines = rows.len().next_multiple_of(8);
        self.tensors.push(FactoredEntry {
            base: elements.start as i64 - range.start as i64,
            first: elements.start as i64,
            last: elements.end as i64,
            columns: columns.len() as i32,
            rows: touched as i32,
            row: row as i32,
            tile_columns: tile_columns as i32,
            first_tile: self.tile_tensors.len() as i32,
            first_line: self.places.len() as i32,
            column_lines: column_lines as i32,
            kind: if matrix { 2 } else { 1 },
            unused: [0; 2],
        });
        let tiles = tile_columns * touched.div_ceil(TILE_ROWS);
        self.tile_tensors.resize(self.tile_tensors.len() + tiles, tensor as i32);
        let place = |place: &Option<usize>| place.map_or(-1, |place| place as i32);
        let first_column = self.places.len() + column_lines;
        self.places.extend(rows.iter().map(place));
        self.places.resize(first_column, -1);
        self.places.extend(columns.iter().map(place));
        self.places.resize(self.places.len().next_multiple_of(LINES), -1);
        self.line_tensors.resize(self.places.len() / LINES, tensor as i32);
        Ok(())
    }

    /// Numbers that are kept, a multiple of 8.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The tables on a device, and what a step needs beside them.
    ///
    /// # Errors
    /// The device has no room.
    pub fn upload(&self, device: &Device) -> Result<StatisticTables> {
        let lines = self.places.len();
        Ok(StatisticTables {
            tensors: device.upload(&self.tensors)?,
            wholes: device.upload(&self.wholes)?,
            tile_tensors: device.upload(&self.tile_tensors)?,
            line_tensors: device.upload(&self.line_tensors)?,
            places: device.upload(&self.places)?,
            partial: device.alloc(self.tile_tensors.len() * (TILE_ROWS + TILE_COLUMNS))?,
            sums: device.zeros(self.len)?,
            factors: device.alloc(self.len)?,
            line_factors: device.alloc(lines)?,
        })
    }
}

/// [`Statistics`] in device memory, with what the kernels of a step leave for one another.
pub struct StatisticTables {
    pub(super) tensors: Buffer<FactoredEntry>,
    pub(super) wholes: Buffer<WholeEntry>,
    pub(super) tile_tensors: Buffer<i32>,
    pub(super) line_tensors: Buffer<i32>,
    pub(super) places: Buffer<i32>,
    pub(super) partial: Buffer<f32>,
    /// Sums of squared gradients, `[len]`: what ranks add up.
    pub sums: Buffer<f32>,
    pub(super) factors: Buffer<f32>,
    pub(super) line_factors: Buffer<f32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::optim::{SliceSpec, TensorSpec};

    fn arena(lens: &[usize]) -> Arena {
        let spec = |&len: &usize| SliceSpec {
            spec: TensorSpec { len, weight_decay: 0.0, adapts: false },
            whole: None,
        };
        Arena::of_slices(&lens.iter().map(spec).collect::<Vec<_>>(), 0).unwrap()
    }

    fn some(range: Range<usize>) -> Vec<Option<usize>> {
        range.map(Some).collect()
    }

    /// The second half of a matrix of 4 rows and 300 columns, from within its second row, and a vector.
    #[test]
    fn tiles_and_lines_of_slices() {
        let arena = arena(&[64, 700, 9]);
        let wholes = [WholeSpec::Matrix([4, 300]), WholeSpec::Elements(9)];
        let matrix = Lines::Matrix { elements: 500..1200, rows: some(1..4), columns: some(4..304) };
        let lines = [Lines::None, matrix, Lines::Elements(some(304..313))];
        let tables = Statistics::new(&arena, &lines, &wholes).unwrap();
        assert_eq!(tables.tile_tensors, [1, 1, 2]);
        assert_eq!(tables.line_tensors, [1, 1, 2]);
        assert_eq!((tables.len(), tables.places.len()), (320, 3 * LINES));
        assert_eq!(tables.places[..9], [1, 2, 3, -1, -1, -1, -1, -1, 4]);
        assert_eq!(tables.places[2 * LINES..][..10], [304, 305, 306, 307, 308, 309, 310, 311, 312, -1]);
        let [none, matrix, vector] = tables.tensors[..] else { panic!("three tensors") };
        assert_eq!(none, FactoredEntry::default());
        assert_eq!((matrix.base, matrix.row, matrix.rows, matrix.column_lines), (500 - 64, 1, 3, 8));
        assert_eq!((vector.first_tile, vector.first_line, vector.kind), (2, 2 * LINES as i32, 1));
        assert_eq!([0, 1].map(|i| (tables.wholes[i].first, tables.wholes[i].rows)), [(0, 4), (304, 0)]);
    }

    #[test]
    fn lines_of_other_tensors_are_refused() {
        let (arena, wholes) = (arena(&[1200]), [WholeSpec::Matrix([4, 300])]);
        let says = |lines: &[Lines]| Statistics::new(&arena, lines, &wholes).unwrap_err().to_string();
        assert!(says(&[]).contains("of 0 tensors are given for an arena of 1"));
        let matrix = |elements, rows, columns| Lines::Matrix { elements, rows, columns };
        assert!(says(&[matrix(0..1199, some(0..4), some(4..304))]).contains("tensor 0 of 1200 elements"));
        assert!(says(&[matrix(0..1200, some(0..3), some(4..304))]).contains("3 rows and 300 columns"));
        assert!(says(&[matrix(0..1200, some(0..4), some(5..305))]).contains("places below 304"));
    }
}
