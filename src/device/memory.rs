//! Device memory, and pinned host memory to copy from and to.

use std::marker::PhantomData;

use bytemuck::Pod;

use super::handle::Ptr;
use super::stream::{Event, Stream};
use super::{Backend, Device};
use crate::{Error, Result};

/// Elements in device memory. Memory is freed when the buffer is dropped, after everything that the
/// device still has queued; so buffers are made once and not step by step.
pub struct Buffer<T: Pod> {
    device: Device,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

impl Device {
    /// Memory for `len` elements, contents undefined: what was there before on a GPU, NaN on the emulator.
    /// Aligned to 256 bytes.
    ///
    /// # Errors
    /// The device has no room.
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| {
            Error::usage(format!("{len} elements of {} bytes do not fit any memory", size_of::<T>()))
        })?;
        let address = if bytes == 0 {
            0
        } else {
            match self.backend() {
                Backend::Cuda(memory) => memory.alloc(bytes)?,
                #[cfg(feature = "emulator")]
                Backend::Emulator(memory) => memory.0.alloc(bytes),
            }
        };
        Ok(Buffer { device: self.clone(), address, len, element: PhantomData })
    }

    /// Memory for `len` elements, all bytes 0.
    ///
    /// # Errors
    /// The device has no room, or has failed.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let buffer = self.alloc(len)?;
        if buffer.bytes() > 0 {
            match self.backend() {
                Backend::Cuda(memory) => memory.zero(buffer.address, buffer.bytes())?,
                #[cfg(feature = "emulator")]
                // SAFETY: the buffer was just made, and nobody has its address.
                Backend::Emulator(memory) => unsafe { memory.zero(buffer.address, buffer.bytes()) },
            }
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
            match self.backend() {
                Backend::Cuda(memory) => memory.upload(buffer.address, bytemuck::cast_slice(host))?,
                #[cfg(feature = "emulator")]
                // SAFETY: the buffer was just made, and nobody has its address.
                Backend::Emulator(memory) => unsafe {
                    memory.copy_in(buffer.address, bytemuck::cast_slice(host));
                },
            }
        }
        Ok(buffer)
    }

    /// Pinned host memory for `len` elements, all bytes 0.
    ///
    /// # Errors
    /// The host has no room that can be pinned.
    pub fn pinned<T: Pod>(&self, len: usize) -> Result<Pinned<T>> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| {
            Error::usage(format!("{len} elements of {} bytes do not fit any memory", size_of::<T>()))
        })?;
        let memory = match self.backend() {
            Backend::Cuda(memory) => HostMemory::Cuda(memory.pinned(bytes)?),
            #[cfg(feature = "emulator")]
            Backend::Emulator(_) => HostMemory::Emulator(vec![0; bytes.div_ceil(16)], bytes),
        };
        Ok(Pinned { memory, len, last: None, element: PhantomData })
    }
}

impl<T: Pod> Buffer<T> {
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
        &self.device
    }

    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// The contents once everything that is queued on the device has run.
    ///
    /// # Errors
    /// The device has failed: also what went wrong in a kernel that ran before.
    pub fn download(&self) -> Result<Vec<T>> {
        let mut host = vec![T::zeroed(); self.len];
        if self.bytes() > 0 {
            match self.device.backend() {
                Backend::Cuda(memory) => {
                    memory.download(bytemuck::cast_slice_mut(&mut host), self.address)?
                }
                #[cfg(feature = "emulator")]
                // SAFETY: the range is this buffer's, and launches have run when they return.
                Backend::Emulator(memory) => unsafe {
                    memory.copy_out(bytemuck::cast_slice_mut(&mut host), self.address);
                },
            }
        }
        Ok(host)
    }

    /// Replaces the contents by `host`, in the order of `stream`. `host` may be changed once this returns.
    ///
    /// # Errors
    /// Another length, a stream that is being captured, a failed device.
    pub fn write(&self, stream: &Stream, host: &[T]) -> Result<()> {
        self.check(stream, host.len(), "written")?;
        if self.bytes() == 0 {
            return Ok(());
        }
        match self.device.backend() {
            Backend::Cuda(memory) => {
                // SAFETY: the range is this buffer's; the driver copies pageable memory before it returns.
                unsafe { memory.copy_in(stream.raw(), self.address, bytemuck::cast_slice(host)) }
            }
            #[cfg(feature = "emulator")]
            Backend::Emulator(memory) => {
                // SAFETY: the range is this buffer's, and launches have run when they return.
                unsafe { memory.copy_in(self.address, bytemuck::cast_slice(host)) };
                Ok(())
            }
        }
    }

    /// Replaces the contents by those of `host`, in the order of `stream` and without waiting.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn write_pinned(&self, stream: &Stream, host: &mut Pinned<T>) -> Result<()> {
        self.check(stream, host.len, "written")?;
        if self.bytes() == 0 {
            return Ok(());
        }
        match self.device.backend() {
            Backend::Cuda(memory) => {
                let source: &[u8] = bytemuck::cast_slice(host.slice());
                // SAFETY: `host` is neither changed nor freed before the event recorded below.
                unsafe { memory.copy_in(stream.raw(), self.address, source)? }
            }
            #[cfg(feature = "emulator")]
            // SAFETY: the range is this buffer's, and launches have run when they return.
            Backend::Emulator(memory) => unsafe {
                memory.copy_in(self.address, bytemuck::cast_slice(host.slice()));
            },
        }
        host.last = Some(stream.record()?);
        Ok(())
    }

    /// Copies the contents to `host`, in the order of `stream` and without waiting: [`Pinned::read`] waits.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn read_pinned(&self, stream: &Stream, host: &mut Pinned<T>) -> Result<()> {
        self.check(stream, host.len, "read")?;
        if self.bytes() == 0 {
            return Ok(());
        }
        match self.device.backend() {
            Backend::Cuda(memory) => {
                let target = bytemuck::cast_slice_mut(host.slice_mut());
                // SAFETY: `host` is neither looked at nor freed before the event recorded below.
                unsafe { memory.copy_out(stream.raw(), target, self.address)? }
            }
            #[cfg(feature = "emulator")]
            // SAFETY: the range is this buffer's, and launches have run when they return.
            Backend::Emulator(memory) => unsafe {
                memory.copy_out(bytemuck::cast_slice_mut(host.slice_mut()), self.address);
            },
        }
        host.last = Some(stream.record()?);
        Ok(())
    }

    fn check(&self, stream: &Stream, len: usize, done: &str) -> Result<()> {
        if len != self.len {
            return Err(Error::usage(format!(
                "a buffer of {} elements cannot be {done} with {len}: the lengths must be the same",
                self.len
            )));
        }
        stream.refuse_capture("a copy between host and device")
    }
}

impl<T: Pod> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.address == 0 {
            return;
        }
        match self.device.backend() {
            // SAFETY: allocated by the same memory, and nobody else frees it.
            Backend::Cuda(memory) => unsafe { memory.free(self.address) },
            #[cfg(feature = "emulator")]
            Backend::Emulator(memory) => memory.0.free(self.address),
        }
    }
}

/// Host memory that the device reaches by itself, so that a copy runs beside everything else.
pub struct Pinned<T: Pod> {
    memory: HostMemory,
    len: usize,
    /// The last copy from or to it.
    last: Option<Event>,
    element: PhantomData<T>,
}

enum HostMemory {
    Cuda(super::cuda::PinnedBytes),
    /// Words that are aligned for every element, and how many bytes of them count.
    #[cfg(feature = "emulator")]
    Emulator(Vec<u128>, usize),
}

impl<T: Pod> Pinned<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The contents, once the last copy has run.
    ///
    /// # Errors
    /// The device has failed.
    pub fn read(&mut self) -> Result<&[T]> {
        self.settle()?;
        Ok(self.slice())
    }

    /// The contents to be changed, once the last copy has run.
    ///
    /// # Errors
    /// The device has failed.
    pub fn edit(&mut self) -> Result<&mut [T]> {
        self.settle()?;
        Ok(self.slice_mut())
    }

    fn settle(&mut self) -> Result<()> {
        match self.last.take() {
            Some(event) => event.synchronize(),
            None => Ok(()),
        }
    }

    fn slice(&self) -> &[T] {
        match &self.memory {
            HostMemory::Cuda(bytes) => bytemuck::cast_slice(bytes.as_slice()),
            #[cfg(feature = "emulator")]
            HostMemory::Emulator(words, bytes) => {
                bytemuck::cast_slice(&bytemuck::cast_slice::<u128, u8>(words)[..*bytes])
            }
        }
    }

    fn slice_mut(&mut self) -> &mut [T] {
        match &mut self.memory {
            HostMemory::Cuda(bytes) => bytemuck::cast_slice_mut(bytes.as_mut_slice()),
            #[cfg(feature = "emulator")]
            HostMemory::Emulator(words, bytes) => {
                bytemuck::cast_slice_mut(&mut bytemuck::cast_slice_mut::<u128, u8>(words)[..*bytes])
            }
        }
    }
}

impl<T: Pod> Drop for Pinned<T> {
    fn drop(&mut self) {
        // A failed device has stopped copying, so there is nothing left to wait for.
        let _ = self.settle();
    }
}
