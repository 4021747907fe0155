//! Device memory.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytemuck::Pod;

use super::backend::elsewhere;
use super::{Device, Pinned, Ptr, Stream};
use crate::{Error, Result};

/// Elements in device memory. Memory is freed when the buffer and all [views](Self::view) of it are
/// dropped, after everything that the device still has queued; so buffers are made once and not step by
/// step. A [`Graph`](super::Graph) keeps what there was when its capture ended, for it may use it; the
/// emulator reports that use instead.
pub struct Buffer<T: Pod> {
    memory: Arc<Memory>,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

/// An allocation, freed when the last buffer in it is dropped.
struct Memory {
    device: Device,
    /// 0 where it has no bytes.
    address: u64,
    bytes: usize,
    /// Whether somebody else frees it.
    lent: bool,
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.lent {
            self.device.backend().give_back(self.address, self.bytes);
        } else if self.address != 0 {
            // SAFETY: the buffers were its owners, and none is left.
            unsafe { self.device.backend().free(self.address) };
            for count in self.device.counts() {
                count.fetch_sub(self.bytes, Ordering::Relaxed);
            }
        }
    }
}

impl Device {
    /// Memory for `len` elements, contents undefined: what was there before on a GPU, NaN on the emulator.
    /// Aligned to 256 bytes.
    ///
    /// # Errors
    /// The device has no room.
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let bytes = bytes::<T>(len)?;
        let address = if bytes == 0 { 0 } else { self.backend().alloc(bytes)? };
        for count in self.counts() {
            count.fetch_add(bytes, Ordering::Relaxed);
        }
        let memory = Arc::new(Memory { device: self.clone(), address, bytes, lent: false });
        Ok(Buffer { memory, address, len, element: PhantomData })
    }

    /// Memory for `len` elements, all bytes 0.
    ///
    /// # Errors
    /// The device has no room, or has failed.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let buffer = self.alloc(len)?;
        if buffer.bytes() > 0 {
            // SAFETY: the whole of a buffer that nobody has yet.
            unsafe { self.backend().zero(buffer.address, buffer.bytes())? };
        }
        Ok(buffer)
    }

    /// A copy of `host` in device memory.
    ///
    /// # Errors
    /// The device has no room, or has failed.
    pub fn upload<T: Pod>(&self, host: &[T]) -> Result<Buffer<T>> {
        let buffer = self.alloc(host.len())?;
        if buffer.bytes() > 0 {
            // SAFETY: as above, and of the length of `host`.
            unsafe { self.backend().upload(buffer.address, bytemuck::cast_slice(host))? };
        }
        Ok(buffer)
    }

    /// Bytes of device memory that the buffers of this device hold now, of one that is
    /// [counted apart](Self::counted_apart) those made through it. Pinned host memory does not count.
    pub fn allocated_bytes(&self) -> usize {
        self.count.bytes.load(Ordering::Relaxed)
    }

    /// Bytes of device memory that could still be allocated: on a GPU, what no program has taken.
    ///
    /// # Errors
    /// The device has failed.
    pub fn free_bytes(&self) -> Result<usize> {
        let all = self.counts().last().map_or(0, |count| count.load(Ordering::Relaxed));
        let left = self.info().memory_bytes.saturating_sub(all);
        Ok(self.backend().free_bytes()?.unwrap_or(left))
    }
}

pub(super) fn bytes<T>(len: usize) -> Result<usize> {
    len.checked_mul(size_of::<T>()).filter(|bytes| isize::try_from(*bytes).is_ok()).ok_or_else(|| {
        Error::usage(format!("{len} elements of {} bytes do not fit any memory", size_of::<T>()))
    })
}

/// Bytes that kernels read at a time, and that lent memory is aligned to.
const WIDE: usize = 16;

impl<T: Pod> Buffer<T> {
    /// `len` elements at `ptr`, in memory that another engine has allocated and keeps: nothing is allocated, copied or
    /// waited for, and dropping the buffer frees nothing. It is not among the
    /// [`allocated_bytes`](Device::allocated_bytes). On the emulator `ptr` is an address of the host, which kernels may
    /// use while the buffer lives. Ranges may be lent that overlap.
    ///
    /// # Errors
    /// Null for more than no elements; an address that is no multiple of 16 bytes, which kernels read at a time; an end
    /// beyond the last address; on a GPU, as far as the driver tells, plain memory of the host, memory of another context
    /// or GPU, and more than was allocated there.
    ///
    /// # Safety
    /// The memory is there until the buffer, all [views](Self::view) of it, and every launch and graph that was given
    /// one are done with it. What others do to it meanwhile, they order by streams and events, as among themselves.
    pub unsafe fn from_raw(device: &Device, ptr: Ptr<T>, len: usize) -> Result<Self> {
        let bytes = bytes::<T>(len)?;
        let (address, device) = (if bytes == 0 { 0 } else { ptr.address() }, device.clone());
        if bytes > 0 {
            if address == 0 {
                return Err(Error::usage(format!(
                    "the address of {len} elements of {} bytes is null; lend the memory that they lie in",
                    size_of::<T>()
                )));
            }
            if !address.is_multiple_of(align_of::<T>().max(WIDE) as u64) {
                return Err(Error::usage(format!(
                    "the address {ptr:?} is not a multiple of {WIDE} bytes, which kernels read at a time; lend memory that \
                     begins at one"
                )));
            }
            if address.checked_add(bytes as u64).is_none() {
                return Err(Error::usage(format!(
                    "{bytes} bytes at {ptr:?} end beyond the last address there is; lend the memory that they lie in"
                )));
            }
            // SAFETY: the caller promises that it stays until the last buffer in it is dropped.
            unsafe { device.backend().lend(address, bytes)? };
        }
        let memory = Arc::new(Memory { device, address, bytes, lent: bytes > 0 });
        Ok(Self { memory, address, len, element: PhantomData })
    }

    /// Address of the first element.
    pub fn ptr(&self) -> Ptr<T> {
        Ptr::from_raw(self.address)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device whose memory it is.
    pub fn device(&self) -> &Device {
        &self.memory.device
    }

    /// The same memory from byte `bytes.start` to `bytes.end` as elements of another type. It keeps the
    /// memory alive; what is written through one is read through the other, in the order of the streams.
    ///
    /// # Errors
    /// A range that is no range of these bytes, that begins where no `U` may lie, or that holds no whole
    /// number of them.
    pub fn view<U: Pod>(&self, bytes: Range<usize>) -> Result<Buffer<U>> {
        let address = self.address + bytes.start as u64;
        let fits = bytes.start <= bytes.end && bytes.end <= self.bytes();
        if !fits
            || !address.is_multiple_of(align_of::<U>() as u64)
            || !bytes.len().is_multiple_of(size_of::<U>().max(1))
        {
            return Err(Error::usage(format!(
                "bytes {bytes:?} of a buffer of {} cannot be viewed as elements of {} bytes: the range must lie \
                 within the buffer, be aligned, and hold whole elements",
                self.bytes(),
                size_of::<U>()
            )));
        }
        let len = bytes.len() / size_of::<U>().max(1);
        Ok(Buffer { memory: self.memory.clone(), address, len, element: PhantomData })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// The contents once everything that is queued on the device has run.
    ///
    /// # Errors
    /// The device has failed: also what went wrong in a kernel that ran before.
    pub fn download(&self) -> Result<Vec<T>> {
        let mut host = vec![T::zeroed(); self.len];
        if self.bytes() > 0 {
            // SAFETY: the whole of this buffer.
            unsafe {
                self.memory.device.backend().download(bytemuck::cast_slice_mut(&mut host), self.address)?
            };
        }
        Ok(host)
    }

    /// Replaces the contents by `host`, in the order of `stream`, and waits until that has happened:
    /// [`write_pinned`](Self::write_pinned) does not wait.
    ///
    /// # Errors
    /// Another length, a stream that is being captured or is of another device, a failed device.
    pub fn write(&self, stream: &Stream, host: &[T]) -> Result<()> {
        self.check(stream, host.len(), "written")?;
        if self.bytes() == 0 {
            return Ok(());
        }
        // SAFETY: the whole of this buffer. `host` may be pinned, or memory that the device reaches as it is, so
        // its copy is waited for before it can change.
        unsafe {
            self.memory.device.backend().copy_in(stream.raw(), self.address, bytemuck::cast_slice(host))?
        };
        stream.synchronize()
    }

    /// Replaces the contents by those of `host`, in the order of `stream` and without waiting.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn write_pinned(&self, stream: &Stream, host: &mut Pinned<T>) -> Result<()> {
        self.write_pinned_first(stream, host, self.len)
    }

    /// The same of the first `len` elements, at most all: what lies behind them stays.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn write_pinned_first(&self, stream: &Stream, host: &mut Pinned<T>, len: usize) -> Result<()> {
        self.check(stream, host.len(), "written")?;
        let bytes = len.min(self.len) * size_of::<T>();
        if bytes == 0 {
            return Ok(());
        }
        host.begin(stream)?;
        // SAFETY: a part of this buffer; `Pinned` leaves its memory alone until the event of `end`.
        unsafe {
            self.memory.device.backend().copy_in(stream.raw(), self.address, &host.memory.bytes()[..bytes])?
        };
        host.end(stream)
    }

    /// Copies the contents to `host`, in the order of `stream` and without waiting: [`Pinned::read`] waits.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn read_pinned(&self, stream: &Stream, host: &mut Pinned<T>) -> Result<()> {
        self.check(stream, host.len(), "read")?;
        if self.bytes() == 0 {
            return Ok(());
        }
        host.begin(stream)?;
        // SAFETY: as above.
        unsafe {
            self.memory.device.backend().copy_out(stream.raw(), host.memory.bytes_mut(), self.address)?
        };
        host.end(stream)
    }

    /// Replaces the contents by those of `source`, in the order of `stream` and without waiting; may be captured.
    /// Nothing happens where both are the same memory.
    ///
    /// # Errors
    /// Another length, memory that overlaps, a stream or a source of another device, a device that has failed.
    pub fn copy_from(&self, stream: &Stream, source: &Buffer<T>) -> Result<()> {
        self.check_len(source.len, "copied from one")?;
        if !self.memory.device.is(stream.device()) || !source.memory.device.is(stream.device()) {
            return Err(elsewhere());
        }
        if self.bytes() == 0 || self.address == source.address {
            return Ok(());
        }
        if self.address.abs_diff(source.address) < self.bytes() as u64 {
            return Err(Error::usage(format!(
                "a buffer of {} elements cannot be copied from one that overlaps it; copy between separate ranges",
                self.len
            )));
        }
        // SAFETY: the whole of both buffers, which are apart.
        unsafe { self.memory.device.backend().copy(stream.raw(), self.address, source.address, self.bytes()) }
    }

    fn check_len(&self, len: usize, done: &str) -> Result<()> {
        if len != self.len {
            return Err(Error::usage(format!(
                "a buffer of {} elements cannot be {done} with {len}: the lengths must be the same",
                self.len
            )));
        }
        Ok(())
    }

    fn check(&self, stream: &Stream, len: usize, done: &str) -> Result<()> {
        self.check_len(len, done)?;
        if !self.memory.device.is(stream.device()) {
            return Err(elsewhere());
        }
        stream.refuse_capture("a copy between host and device")
    }
}
