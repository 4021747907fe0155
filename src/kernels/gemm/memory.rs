//! Matrices and vectors in device memory, with how much memory there is: what a checked launch can verify.

use std::marker::PhantomData;

use bytemuck::Pod;

use crate::device::{Buffer, Ptr};
use crate::{Error, Result};

/// Alignment of what the kernels read 16 bytes at a time.
const WIDE: usize = 16;

/// A row-major matrix in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    start: Vector<'a, T>,
    stride: usize,
}

/// Elements in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Vector<'a, T> {
    ptr: Ptr<T>,
    len: usize,
    memory: PhantomData<&'a T>,
}

impl<'a, T> Vector<'a, T> {
    /// An operand that is not there.
    pub const fn none() -> Self {
        Self { ptr: Ptr::null(), len: 0, memory: PhantomData }
    }

    /// The elements of a buffer from `offset` on; empty where that lies outside.
    pub fn of(buffer: &'a Buffer<T>, offset: usize) -> Self
    where
        T: Pod,
    {
        let offset = offset.min(buffer.len());
        Self { ptr: buffer.ptr().offset(offset), len: buffer.len() - offset, memory: PhantomData }
    }

    /// `len` elements at an address that another engine gives.
    ///
    /// # Safety
    /// They lie in memory of the device, and stay there until every launch that they are given to has run.
    pub const unsafe fn raw(ptr: Ptr<T>, len: usize) -> Self {
        Self { ptr, len, memory: PhantomData }
    }

    /// Address of the first element.
    pub const fn ptr(&self) -> Ptr<T> {
        self.ptr
    }

    /// Whether it is not there.
    pub const fn is_none(&self) -> bool {
        self.ptr.is_null()
    }

    pub(super) fn check(&self, name: &str, len: usize) -> Result<()> {
        self.check_aligned(name, len, size_of::<T>())
    }

    pub(super) fn check_optional(&self, name: &str, len: usize) -> Result<()> {
        if self.is_none() { Ok(()) } else { self.check(name, len) }
    }

    /// Optional, and read 16 bytes at a time.
    pub(super) fn check_wide(&self, name: &str, len: usize) -> Result<()> {
        if self.is_none() { Ok(()) } else { self.check_aligned(name, len, WIDE) }
    }

    fn check_aligned(&self, name: &str, len: usize, alignment: usize) -> Result<()> {
        if self.is_none() {
            return Err(Error::usage(format!("gemm: {name} is null; give it an address in device memory")));
        }
        if !self.ptr.address().is_multiple_of(alignment as u64) {
            return Err(Error::usage(format!(
                "gemm: {name} lies at {:?}; the address must be a multiple of {alignment} bytes",
                self.ptr
            )));
        }
        if self.len < len {
            return Err(Error::usage(format!(
                "gemm: {name} has memory for {} elements and needs {len}; make it larger",
                self.len
            )));
        }
        Ok(())
    }
}

impl Vector<'_, u8> {
    pub(super) fn check_workspace(&self, bytes: usize) -> Result<()> {
        if self.is_none() || self.len < bytes {
            return Err(Error::usage(format!(
                "gemm: the workspace has {} bytes and must have {bytes}; ask workspace_bytes before",
                self.len
            )));
        }
        self.check_aligned("the workspace", bytes, WIDE)
    }
}

/// A vector that is all of a buffer.
impl<'a, T: Pod> From<&'a Buffer<T>> for Vector<'a, T> {
    fn from(buffer: &'a Buffer<T>) -> Self {
        Self::of(buffer, 0)
    }
}

impl<'a, T> Matrix<'a, T> {
    /// An operand that is not there.
    pub const fn none() -> Self {
        Self { start: Vector::none(), stride: 0 }
    }

    /// Rows that begin `stride` elements apart, from element `offset` of a buffer on.
    pub fn of(buffer: &'a Buffer<T>, offset: usize, stride: usize) -> Self
    where
        T: Pod,
    {
        Self { start: Vector::of(buffer, offset), stride }
    }

    /// The same at an address that another engine gives, with `len` elements of memory from there on.
    ///
    /// # Safety
    /// As for [`Vector::raw`].
    pub const unsafe fn raw(ptr: Ptr<T>, stride: usize, len: usize) -> Self {
        // SAFETY: the caller answers for the memory.
        Self { start: unsafe { Vector::raw(ptr, len) }, stride }
    }

    /// Address of the first element.
    pub const fn ptr(&self) -> Ptr<T> {
        self.start.ptr
    }

    /// Whether it is not there.
    pub const fn is_none(&self) -> bool {
        self.start.is_none()
    }

    /// Elements from the start of a row to that of the next.
    pub const fn stride(&self) -> usize {
        self.stride
    }

    pub(super) fn check(&self, name: &str, [rows, cols]: [usize; 2]) -> Result<()> {
        let wide = WIDE / size_of::<T>();
        if self.start.is_none() {
            return self.start.check(name, 0);
        }
        if self.stride < cols || !self.stride.is_multiple_of(wide) || i64::try_from(self.stride).is_err() {
            return Err(Error::usage(format!(
                "gemm: the rows of {name} lie {} elements apart; that must be a multiple of {wide} and at least \
                 {cols}, the length of a row",
                self.stride
            )));
        }
        match (rows - 1).checked_mul(self.stride).and_then(|start| start.checked_add(cols)) {
            Some(len) => self.start.check_aligned(name, len, WIDE),
            None => Err(Error::usage(format!(
                "gemm: {name} is a matrix of {rows} rows that lie {} elements apart; no memory is that large",
                self.stride
            ))),
        }
    }

    pub(super) fn check_optional(&self, name: &str, shape: [usize; 2]) -> Result<()> {
        if self.start.is_none() { Ok(()) } else { self.check(name, shape) }
    }
}
