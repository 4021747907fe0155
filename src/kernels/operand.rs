//! Checks of what checked launches are given, told by name.

use bytemuck::Pod;

use crate::device::{Buffer, Ptr};
use crate::error::{Error, Result};

/// Elements to which rows are aligned: 16 bytes of bf16.
const ALIGNMENT: usize = 8;
/// Bytes that kernels read at a time, to which rows, parameters and workspaces are aligned.
const WIDE: u64 = 16;

/// Rows within a buffer: row `r` begins at element `offset + r·stride`.
#[derive(Clone, Copy)]
pub struct Rows<'a, T: Pod> {
    /// Where they lie.
    pub buffer: &'a Buffer<T>,
    /// First element of row 0, a multiple of 8.
    pub offset: usize,
    /// Elements from row to row, a multiple of 8.
    pub stride: usize,
}

impl<'a, T: Pod> Rows<'a, T> {
    /// Rows of `width` one after another from the beginning.
    pub fn dense(buffer: &'a Buffer<T>, width: usize) -> Self {
        Self { buffer, offset: 0, stride: width }
    }

    /// The address of row 0, once `rows` rows of `width` elements are known to fit and to be aligned.
    pub(crate) fn check(&self, name: &str, rows: usize, width: usize) -> Result<Ptr<T>> {
        let Self { buffer, offset, stride } = *self;
        if !offset.is_multiple_of(ALIGNMENT) || !stride.is_multiple_of(ALIGNMENT) {
            return Err(Error::usage(format!(
                "{name}: offset {offset} and row stride {stride} must be multiples of {ALIGNMENT} elements; \
                 lay the rows out so that each begins at 16 bytes"
            )));
        }
        if stride < width {
            return Err(Error::usage(format!(
                "{name}: rows of {width} elements overlap at a stride of {stride}; give a stride of at least \
                 {width}"
            )));
        }
        let needed = (rows.max(1) - 1)
            .checked_mul(stride)
            .and_then(|last| last.checked_add(offset)?.checked_add(width))
            .filter(|&needed| needed <= buffer.len());
        let first = buffer.ptr().offset(offset);
        if !first.address().is_multiple_of(WIDE) {
            return Err(Error::usage(format!(
                "{name}: row 0 lies at {first:?}, expected a multiple of {WIDE} bytes; begin the buffer at one"
            )));
        }
        match needed {
            Some(_) => Ok(first),
            None => Err(Error::usage(format!(
                "{name}: {rows} rows of {width} elements at a stride of {stride} from element {offset} do not \
                 fit a buffer of {}; give a larger one",
                buffer.len()
            ))),
        }
    }
}

/// The address of a buffer that holds exactly `shape`.
pub(crate) fn check_len<T: Pod>(name: &str, buffer: &Buffer<T>, shape: &[usize]) -> Result<Ptr<T>> {
    let expected: usize = shape.iter().product();
    if buffer.len() == expected {
        return Ok(buffer.ptr());
    }
    Err(Error::usage(format!(
        "{name} has {} elements, expected {expected} (shape {shape:?}); give a buffer of that size",
        buffer.len()
    )))
}

/// As [`check_len`] for an operand that may be missing: then null.
pub(crate) fn check_some<T: Pod>(name: &str, buffer: Option<&Buffer<T>>, shape: &[usize]) -> Result<Ptr<T>> {
    buffer.map_or(Ok(Ptr::null()), |buffer| check_len(name, buffer, shape))
}

/// The address, once it is known to be a multiple of `bytes`: a view begins wherever an element may lie.
pub(crate) fn check_aligned<T: Pod>(name: &str, at: Ptr<T>, bytes: u64) -> Result<Ptr<T>> {
    if at.address().is_multiple_of(bytes) {
        return Ok(at);
    }
    Err(Error::usage(format!(
        "{name} lies at {at:?}, expected a multiple of {bytes} bytes, which kernels read at a time; begin the buffer at one"
    )))
}

/// As [`check_len`] for an operand of which kernels read 16 bytes at a time.
pub(crate) fn check_wide<T: Pod>(name: &str, buffer: &Buffer<T>, shape: &[usize]) -> Result<Ptr<T>> {
    check_aligned(name, check_len(name, buffer, shape)?, WIDE)
}

/// As [`check_wide`] for an operand that may be missing: then null.
pub(crate) fn check_wide_some<T: Pod>(
    name: &str,
    buffer: Option<&Buffer<T>>,
    shape: &[usize],
) -> Result<Ptr<T>> {
    buffer.map_or(Ok(Ptr::null()), |buffer| check_wide(name, buffer, shape))
}

/// The address of a workspace of at least `bytes`, aligned to 16.
pub(crate) fn check_workspace(buffer: &Buffer<u8>, bytes: usize) -> Result<Ptr<u8>> {
    if buffer.len() >= bytes {
        return check_aligned("the workspace", buffer.ptr(), WIDE);
    }
    Err(Error::usage(format!(
        "the workspace has {} bytes, expected at least {bytes}; ask for the size beforehand",
        buffer.len()
    )))
}

/// Whether the host's copy of `cu_seqlens` begins at 0, never decreases and ends within `tokens`.
pub(crate) fn check_cu_seqlens(cu_seqlens: &[i32], images: usize, tokens: usize) -> Result<()> {
    if cu_seqlens.len() != images + 1 {
        return Err(Error::usage(format!(
            "cu_seqlens has {} entries, expected {} for {images} image slots",
            cu_seqlens.len(),
            images + 1
        )));
    }
    if cu_seqlens[0] != 0 {
        return Err(Error::usage(format!("cu_seqlens begins at {}, expected 0", cu_seqlens[0])));
    }
    if let Some(at) = cu_seqlens.windows(2).position(|pair| pair[1] < pair[0]) {
        return Err(Error::usage(format!(
            "cu_seqlens decreases from {} to {} at image {at}; every image must end where the next one begins",
            cu_seqlens[at],
            cu_seqlens[at + 1]
        )));
    }
    let end = cu_seqlens[images];
    if end as usize > tokens {
        return Err(Error::usage(format!(
            "cu_seqlens ends at {end}, beyond the {tokens} token rows of the batch; pack fewer images"
        )));
    }
    Ok(())
}

/// Whether all of `extents`, numbers of rows, slots or columns, are at least 1 and at most 2^30.
pub(crate) fn check_extents(name: &str, extents: &[usize]) -> Result<()> {
    if extents.iter().all(|n| (1..=1 << 30).contains(n)) {
        return Ok(());
    }
    Err(Error::usage(format!("{name}: sizes {extents:?} are not possible, all must be 1 to 2^30")))
}

/// Whether rows have 1 to 2^20 columns, a multiple of `unit`.
pub(crate) fn check_width(name: &str, width: usize, unit: usize) -> Result<()> {
    if width > 0 && width <= 1 << 20 && width.is_multiple_of(unit) {
        return Ok(());
    }
    Err(Error::usage(format!("{name}: rows have {width} columns, expected a multiple of {unit} to 2^20")))
}

/// Blocks of a grid along x.
pub(crate) fn grid(blocks: usize) -> Result<[u32; 3]> {
    match i32::try_from(blocks) {
        Ok(blocks) => Ok([blocks as u32, 1, 1]),
        Err(_) => Err(Error::usage(format!(
            "a launch would need {blocks} blocks, more than 2^31 - 1; use a smaller token budget"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::{check_cu_seqlens, check_extents, check_width, grid};

    #[test]
    fn sizes_are_checked() {
        assert!(check_extents("x", &[1, 1 << 30]).is_ok());
        assert!(check_extents("x", &[1, 0]).is_err() && check_extents("x", &[(1 << 30) + 1]).is_err());
        assert!(check_width("x", 24, 8).is_ok());
        assert!(check_width("x", 0, 8).is_err() && check_width("x", 24, 16).is_err());
        assert!(grid(1 << 31).is_err());
    }

    #[test]
    fn bad_cu_seqlens_are_told_apart() {
        let says = |cu: &[i32], images, tokens| check_cu_seqlens(cu, images, tokens).unwrap_err().to_string();
        assert!(check_cu_seqlens(&[0, 3, 3, 8], 3, 8).is_ok());
        assert!(check_cu_seqlens(&[0], 0, 8).is_ok());
        assert!(says(&[0, 3], 3, 8).contains("expected 4"));
        assert!(says(&[1, 3], 1, 8).contains("begins at 1"));
        assert!(says(&[0, 5, 4], 2, 8).contains("decreases from 5 to 4 at image 1"));
        assert!(says(&[0, -1], 1, 8).contains("decreases"));
        assert!(says(&[0, 9], 1, 8).contains("beyond the 8 token rows"));
    }
}
