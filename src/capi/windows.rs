//! Windows of images as segments of attention.

use bytemuck::Zeroable;

use super::operands::count;
use super::status::{Refusal, Result, Status, guard};
use super::structs::{read, sized, write};
use crate::kernels::attention::{WindowSizes, Windows as Checked};
use crate::ops::Grid;

/// Images cut into windows, each of which is a segment of attention (Qwen2.5-VL): the order in which the token rows of a
/// window follow one another, and the `cu_seqlens` of the windows. Memory of the host; no device takes part.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct Windows {
    /// sizeof(trencadis_windows).
    pub size: u64,
    /// Images.
    pub images: u64,
    /// Rows and columns of patches of each image, [images, 2].
    pub grids: *const u32,
    /// Side of a window in patches, a multiple of `merge`. Windows at the right and lower edges are smaller.
    pub window: u64,
    /// Side of the units that are merged later, and whose patches stay together, in patches; 1: there are none.
    pub merge: u64,
    /// Written, `[rows]`: row i of the new order is row `order[i]` of the old one, where patches of an image follow row by row;
    /// null asks for the sizes below alone, as it does for the two below.
    pub order: *mut i32,
    /// Written, `[rows]`: row i of the old order is row `inverse[i]` of the new one.
    pub inverse: *mut i32,
    /// Written, [segments + 1]: starts of the windows in the new order, and the end of the last one.
    pub cu_seqlens: *mut i32,
    /// Rows that `order` and `inverse` have room for; becomes those that there are.
    pub rows: u64,
    /// Windows that `cu_seqlens` has room for; becomes those that there are.
    pub segments: u64,
    /// Becomes the rows of the largest window.
    pub longest: u64,
}
sized!(Windows, "trencadis_windows", 88);

/// Makes the order of windows. Where arrays are null or too small nothing but the sizes is written, and too small is an
/// invalid argument.
///
/// # Safety
/// `windows` is a struct whose `size` is set, its arrays null or as large as its numbers say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_windows_make(windows: *mut Windows) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe { make(windows) })
}

/// # Safety
/// As for [`trencadis_windows_make`].
unsafe fn make(windows: *mut Windows) -> Result {
    // SAFETY: as the caller promises.
    let given = unsafe { read(windows)? };
    let grids = if given.images == 0 {
        Vec::new()
    } else if given.grids.is_null() || !given.grids.is_aligned() || given.images > 1 << 30 {
        return Err(Refusal::invalid(format!(
            "windows: grids lie at {:p} for {} images; give the address of rows and columns of each, of at most 2^30",
            given.grids, given.images
        )));
    } else {
        // SAFETY: neither null nor misaligned, and as long as the caller promises.
        let sides = unsafe { std::slice::from_raw_parts(given.grids, 2 * count(given.images)) };
        sides.chunks_exact(2).map(|side| Grid { rows: side[0] as usize, cols: side[1] as usize }).collect()
    };
    let (window, merge) = (count(given.window), count(given.merge));
    let WindowSizes { rows, segments, longest } = Checked::sizes(&grids, window, merge)?;
    let told = Windows { rows: rows as u64, segments: segments as u64, longest: longest as u64, ..given };
    // SAFETY: as the caller promises.
    unsafe { write(windows, &told)? };
    let small = |at: *mut i32, room: u64, needed: usize| !at.is_null() && count(room) < needed;
    if small(given.order, given.rows, rows)
        || small(given.inverse, given.rows, rows)
        || small(given.cu_seqlens, given.segments, segments)
    {
        return Err(Refusal::invalid(format!(
            "windows: there are {rows} rows in {segments} windows, and room for {} in {}; give larger arrays",
            given.rows, given.segments
        )));
    }
    if given.order.is_null() && given.inverse.is_null() && given.cu_seqlens.is_null() {
        return Ok(());
    }
    let made = Checked::new(&grids, window, merge)?;
    // Rows are at most 2^30, or there were no windows.
    let fill = |at: *mut i32, from: &[usize]| {
        if !at.is_null() {
            for (i, &row) in from.iter().enumerate() {
                // SAFETY: the array has room for all of them, as was looked at above.
                unsafe { at.add(i).write_unaligned(row as i32) };
            }
        }
    };
    fill(given.order, &made.order);
    fill(given.inverse, &made.inverse);
    if !given.cu_seqlens.is_null() {
        for (i, &start) in made.cu_seqlens.iter().enumerate() {
            // SAFETY: as above.
            unsafe { given.cu_seqlens.add(i).write_unaligned(start) };
        }
    }
    Ok(())
}
