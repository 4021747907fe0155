//! The caller's memory, as the checked launches take it.

use bytemuck::Pod;

use super::status::{Refusal, Result};
use crate::device::{Buffer, Device, Ptr};
use crate::kernels::Rows;
use crate::kernels::gemm::Matrix;
use crate::ops::{AttentionConfig, QkNormKind};

/// Memory that a function is given, on one device. Its name comes first in what is refused.
pub(super) struct Memory<'a> {
    pub device: &'a Device,
    pub operation: &'static str,
}

/// Rows of a matrix.
pub(super) struct Lines<T: Pod> {
    buffer: Buffer<T>,
    stride: usize,
}

impl<T: Pod> Lines<T> {
    pub fn rows(&self) -> Rows<'_, T> {
        Rows { buffer: &self.buffer, offset: 0, stride: self.stride }
    }

    pub fn matrix(&self) -> Matrix<'_, T> {
        Matrix::of(&self.buffer, 0, self.stride)
    }
}

/// The matrix, or none.
pub(super) fn matrix_of<T: Pod>(lines: &Option<Lines<T>>) -> Matrix<'_, T> {
    lines.as_ref().map_or(Matrix::none(), Lines::matrix)
}

/// A number that the caller gives; one that does not fit is larger than everything that is allowed.
pub(super) fn count(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl Memory<'_> {
    fn refuse<T>(&self, name: &str, what: impl std::fmt::Display) -> Result<T> {
        Err(Refusal::invalid(format!("{}: {name} {what}", self.operation)))
    }

    /// `len` elements.
    pub fn vector<T: Pod, P>(&self, name: &str, at: *const P, len: usize) -> Result<Buffer<T>> {
        // SAFETY: whoever calls a function of C promises that the memory is there until the kernels have run.
        let buffer = unsafe { Buffer::from_raw(self.device, Ptr::from_raw(at.addr() as u64), len) };
        buffer.map_err(|error| {
            let Refusal { status, message } = error.into();
            Refusal { status, message: format!("{}: {name}: {message}", self.operation) }
        })
    }

    /// The same where it may be null: none.
    pub fn optional<T: Pod, P>(&self, name: &str, at: *const P, len: usize) -> Result<Option<Buffer<T>>> {
        if at.is_null() { Ok(None) } else { self.vector(name, at, len).map(Some) }
    }

    /// γq, βq, γk, βk of `config`, or their gradients; none where it has no norm.
    pub fn affine(
        &self,
        config: &AttentionConfig,
        names: [&str; 4],
        at: [*const f32; 4],
    ) -> Result<[Option<Buffer<f32>>; 4]> {
        let mut all = [const { None }; 4];
        if config.norm != QkNormKind::None {
            let heads = [config.heads, config.heads, config.kv_heads, config.kv_heads];
            for (((buffer, name), at), heads) in all.iter_mut().zip(names).zip(at).zip(heads) {
                let heads = if config.gain_per_head { heads } else { 1 };
                *buffer = self.optional(name, at, heads * config.head_dim)?;
            }
        }
        Ok(all)
    }

    /// The last number of `cu_seqlens[slots + 1]`, the rows that hold anything; none where it is null: all.
    pub fn live(&self, cu_seqlens: *const i32, slots: u64) -> Result<Option<Buffer<i32>>> {
        if cu_seqlens.is_null() {
            return Ok(None);
        }
        let slots = count(slots);
        let all: Buffer<i32> = self.vector("cu_seqlens", cu_seqlens, slots.saturating_add(1))?;
        Ok(Some(all.view(slots * size_of::<i32>()..(slots + 1) * size_of::<i32>())?))
    }

    /// `rows` rows of `columns` elements, `stride` elements apart; 0 is one after another.
    pub fn lines<T: Pod, P>(
        &self,
        name: &str,
        at: *const P,
        [rows, columns]: [usize; 2],
        stride: u64,
    ) -> Result<Lines<T>> {
        let stride = if stride == 0 { columns } else { count(stride) };
        let last = rows.saturating_sub(1).checked_mul(stride).and_then(|start| start.checked_add(columns));
        let len = if rows == 0 { Some(0) } else { last };
        match len {
            Some(len) => Ok(Lines { buffer: self.vector(name, at, len)?, stride }),
            None => {
                self.refuse(name, format!("has {rows} rows {stride} elements apart, which no memory holds"))
            }
        }
    }

    /// The same where it may be null: none.
    pub fn optional_lines<T: Pod, P>(
        &self,
        name: &str,
        at: *const P,
        shape: [usize; 2],
        stride: u64,
    ) -> Result<Option<Lines<T>>> {
        if at.is_null() { Ok(None) } else { self.lines(name, at, shape, stride).map(Some) }
    }

    /// A workspace of `given` bytes, of which `needed` are. Null where none are.
    pub fn workspace<P>(&self, at: *const P, given: u64, needed: usize) -> Result<Buffer<u8>> {
        if needed > 0 && count(given) < needed {
            return self.refuse(
                "workspace",
                format!("has {given} bytes and must have {needed}; the plan function tells beforehand"),
            );
        }
        self.vector("workspace", at, needed)
    }
}

/// The host's copy of `cu_seqlens`; none where it is null.
///
/// # Safety
/// `at` is null or the address of `slots + 1` numbers, which stay as they are as long as the slice is used.
pub(super) unsafe fn host_starts<'a>(at: *const i32, slots: usize) -> Result<Option<&'a [i32]>> {
    if at.is_null() {
        return Ok(None);
    }
    if !at.is_aligned() || slots > 1 << 30 {
        return Err(Refusal::invalid(format!(
            "cu_seqlens_host at {at:p} for {slots} slots: the address must be a multiple of 4 and the slots at most \
             2^30"
        )));
    }
    // SAFETY: as the caller promises.
    Ok(Some(unsafe { std::slice::from_raw_parts(at, slots + 1) }))
}
