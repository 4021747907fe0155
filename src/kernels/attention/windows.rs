//! Attention in windows, as in Qwen2.5-VL: images are cut into windows, and each window is a segment of
//! `cu_seqlens`. The kernels know nothing of it; what changes is the order of the token rows.
//!
//! Windows come row by row, within a window its merge units row by row, within a unit its patches row by row
//! (Qwen2.5-VL technical report, section 2.1.1). Windows at the right and lower edges of an image are smaller,
//! not padded. The rows of an image stay its own, so that layers with full attention take them in the same order
//! with the images' own `cu_seqlens`, and the merge units, wherever they are, are consecutive rows.

use crate::error::{Error, Result};
use crate::ops::Grid;

/// Most rows of a batch, as attention takes them.
const MAX_ROWS: usize = 1 << 30;

/// A vector with room for `len` elements.
fn room<T>(len: usize) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    match vector.try_reserve_exact(len) {
        Ok(()) => Ok(vector),
        Err(_) => Err(Error::failure(format!(
            "the host has no room for windows of {len} elements; put fewer images into a batch"
        ))),
    }
}

/// The order of token rows in which windows follow one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Row `i` of the new order is row `order[i]` of the old one: images one after another, their patches row by row.
    pub order: Vec<usize>,
    /// Row `i` of the old order is row `inverse[i]` of the new one.
    pub inverse: Vec<usize>,
    /// Starts of the windows in the new order, ascending from 0, and the end of the last one. None is empty.
    pub cu_seqlens: Vec<i32>,
}

/// What there is to make room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSizes {
    /// Token rows of all images.
    pub rows: usize,
    /// Windows, each a segment of `cu_seqlens`.
    pub segments: usize,
    /// Most rows of a window.
    pub longest: usize,
}

impl Windows {
    /// The sizes of what [`new`](Self::new) makes, which it refuses where this does. Nothing is allocated.
    ///
    /// # Errors
    /// As for [`new`](Self::new), but for the room.
    pub fn sizes(grids: &[Grid], window: usize, merge: usize) -> Result<WindowSizes> {
        if window == 0 || merge == 0 || !window.is_multiple_of(merge) {
            return Err(Error::usage(format!(
                "windows of {window} patches a side, merged by {merge}: the window must be a multiple of the merge \
                 unit, and neither may be 0"
            )));
        }
        let mut sizes = WindowSizes::default();
        for (image, &Grid { rows, cols: columns }) in grids.iter().enumerate() {
            if !rows.is_multiple_of(merge) || !columns.is_multiple_of(merge) {
                return Err(Error::usage(format!(
                    "image {image} has {rows} x {columns} patches, which merge units of {merge} x {merge} do not \
                     divide; resize it to a multiple of them"
                )));
            }
            let end = rows.checked_mul(columns).and_then(|patches| patches.checked_add(sizes.rows));
            let Some(end) = end.filter(|&end| end <= MAX_ROWS) else {
                return Err(Error::usage(format!(
                    "image {image} of {rows} x {columns} patches ends beyond 2^30 rows; put fewer images into a batch"
                )));
            };
            sizes.rows = end;
            // No more than there are rows: none is empty.
            sizes.segments += rows.div_ceil(window) * columns.div_ceil(window);
            sizes.longest = sizes.longest.max(rows.min(window) * columns.min(window));
        }
        Ok(sizes)
    }

    /// The windows of images of `grids` patches: squares of `window` patches a side, made of units of `merge` patches a
    /// side that are merged later and stay together. Qwen2.5-VL: windows of 112 pixels, 8 patches of 14, and units of 2.
    ///
    /// # Errors
    /// A window of 0 or that is not made of whole units; an image that is not; more than 2^30 rows, as many as attention
    /// takes; no room on the host.
    pub fn new(grids: &[Grid], window: usize, merge: usize) -> Result<Self> {
        let sizes = Self::sizes(grids, window, merge)?;
        let (mut order, mut inverse) = (room(sizes.rows)?, room(sizes.rows)?);
        let mut cu_seqlens = room(sizes.segments + 1)?;
        cu_seqlens.push(0);
        let mut first = 0;
        // One side may be long where the other is 0.
        for &Grid { rows, cols: columns } in grids.iter().filter(|grid| grid.rows > 0 && grid.cols > 0) {
            for top in (0..rows).step_by(window) {
                for left in (0..columns).step_by(window) {
                    let (bottom, right) = (rows.min(top + window), columns.min(left + window));
                    for unit_row in (top..bottom).step_by(merge) {
                        for unit_column in (left..right).step_by(merge) {
                            order.extend(
                                (unit_row..unit_row + merge)
                                    .flat_map(|row| {
                                        (unit_column..unit_column + merge).map(move |column| (row, column))
                                    })
                                    .map(|(row, column)| first + row * columns + column),
                            );
                        }
                    }
                    cu_seqlens.push(order.len() as i32);
                }
            }
            first += rows * columns;
        }
        inverse.resize(order.len(), 0);
        for (new, &old) in order.iter().enumerate() {
            inverse[old] = new;
        }
        Ok(Self { order, inverse, cu_seqlens })
    }

    /// Most rows of a window.
    pub fn longest(&self) -> usize {
        self.cu_seqlens.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn grids(sides: &[(usize, usize)]) -> Vec<Grid> {
        sides.iter().map(|&(rows, cols)| Grid { rows, cols }).collect()
    }

    /// 6 x 10 patches in windows of 4 and units of 2: windows of 16, 16, 8 and 8, 8, 4 patches.
    #[test]
    fn an_image_by_hand() {
        let windows = Windows::new(&grids(&[(6, 10)]), 4, 2).unwrap();
        assert_eq!(windows.cu_seqlens, [0, 16, 32, 40, 48, 56, 60]);
        // The first window, unit by unit.
        assert_eq!(windows.order[..8], [0, 1, 10, 11, 2, 3, 12, 13]);
        assert_eq!(windows.order[8..16], [20, 21, 30, 31, 22, 23, 32, 33]);
        // Its right neighbour, that at the right edge, and that at the lower right corner.
        assert_eq!(windows.order[16..20], [4, 5, 14, 15]);
        assert_eq!(windows.order[32..40], [8, 9, 18, 19, 28, 29, 38, 39]);
        assert_eq!(windows.order[56..], [48, 49, 58, 59]);
        assert_eq!(windows.longest(), 16);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let says = |sides: &[(usize, usize)], window, merge| {
            Windows::new(&grids(sides), window, merge).unwrap_err().to_string()
        };
        assert!(says(&[], 7, 2).contains("a multiple of the merge unit"));
        assert!(says(&[], 0, 1).contains("neither may be 0"));
        assert!(says(&[], 4, 0).contains("neither may be 0"));
        assert!(says(&[(4, 4), (4, 7)], 4, 2).contains("image 1 has 4 x 7 patches"));
        assert!(says(&[(1 << 20, 1 << 20)], 4, 2).contains("2^30"));
        assert!(
            says(&[(46_340, 46_340)], 4, 2)
                .contains("image 0 of 46340 x 46340 patches ends beyond 2^30 rows")
        );
        assert!(says(&[(1 << 15, 1 << 15), (2, 2)], 4, 2).contains("image 1 of 2 x 2"));
        assert!(says(&[(usize::MAX - 1, 2)], 4, 2).contains("2^30"));
        assert_eq!(Windows::new(&grids(&[(0, 8), (4, 0)]), 4, 2).unwrap().cu_seqlens, [0]);
    }

    #[test]
    fn the_sizes_of_images_of_any_size_are_told() {
        let most = Windows::sizes(&grids(&[(1 << 15, 1 << 15)]), 8, 2).unwrap();
        assert_eq!(most, WindowSizes { rows: 1 << 30, segments: 1 << 24, longest: 64 });
        // A side without end, of no rows.
        let none = grids(&[(usize::MAX, 0), (0, usize::MAX)]);
        assert_eq!(Windows::sizes(&none, 1, 1).unwrap(), WindowSizes::default());
        assert_eq!(Windows::new(&none, 1, 1).unwrap().cu_seqlens, [0]);
        // A window without end, of one image.
        let one = Windows::sizes(&grids(&[(6, 10)]), usize::MAX, 1).unwrap();
        assert_eq!(one, WindowSizes { rows: 60, segments: 1, longest: 60 });
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn windows_partition_every_image(
            sides in prop::collection::vec((0usize..9, 1usize..9), 0..5), units in 1usize..5, merge in 1usize..4,
        ) {
            let grids: Vec<_> =
                sides.iter().map(|&(rows, cols)| Grid { rows: rows * merge, cols: cols * merge }).collect();
            let window = units * merge;
            let windows = Windows::new(&grids, window, merge).unwrap();
            let sizes = Windows::sizes(&grids, window, merge).unwrap();
            let segments = windows.cu_seqlens.len() - 1;
            let made = WindowSizes { rows: windows.order.len(), segments, longest: windows.longest() };
            prop_assert_eq!(sizes, made);
            // Where each old row lies: image, patch row, patch column.
            let mut places = Vec::new();
            for (image, &Grid { rows, cols: columns }) in grids.iter().enumerate() {
                places.extend((0..rows * columns).map(|i| (image, i / columns, i % columns)));
            }
            let mut sorted = windows.order.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..places.len()).collect::<Vec<_>>());
            prop_assert!((0..places.len()).all(|i| windows.inverse[windows.order[i]] == i));

            let place = |i: usize| places[windows.order[i]];
            let block = |i: usize| { let (image, row, column) = place(i); (image, row / window, column / window) };
            prop_assert_eq!(*windows.cu_seqlens.last().unwrap() as usize, places.len());
            let mut before = None;
            for pair in windows.cu_seqlens.windows(2) {
                let (start, end) = (pair[0] as usize, pair[1] as usize);
                prop_assert!(start < end && end - start <= window * window);
                // All of one window of one image and of no other, behind that before it in reading order.
                prop_assert!((start..end).all(|i| block(i) == block(start)));
                prop_assert!(before < Some(block(start)));
                before = Some(block(start));
                // Merge units are whole, and follow in reading order; so do patches within a unit.
                for (unit, i) in (start..end).step_by(merge * merge).enumerate() {
                    let (_, row, column) = place(i);
                    prop_assert!(row % merge == 0 && column % merge == 0);
                    for j in 0..merge * merge {
                        prop_assert_eq!(place(i + j), (block(i).0, row + j / merge, column + j % merge));
                    }
                    if unit > 0 {
                        let (_, row_before, column_before) = place(i - merge * merge);
                        prop_assert!((row_before, column_before) < (row, column));
                    }
                }
            }
        }
    }
}
