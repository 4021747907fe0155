//! Host memory that is pinned, to copy from and to.

use std::marker::PhantomData;

use bytemuck::Pod;

use super::backend::HostMemory;
use super::memory::bytes;
use super::{Device, Event, Stream};
use crate::Result;

impl Device {
    /// Pinned host memory for `len` elements, all bytes 0.
    ///
    /// # Errors
    /// The host has no room that can be pinned.
    pub fn pinned<T: Pod>(&self, len: usize) -> Result<Pinned<T>> {
        let memory = self.backend().pinned(bytes::<T>(len)?)?;
        Ok(Pinned { memory, len, last: None, element: PhantomData })
    }
}

/// Host memory that the device reaches by itself, so that a copy runs beside everything else.
pub struct Pinned<T: Pod> {
    pub(super) memory: Box<dyn HostMemory>,
    len: usize,
    /// The last copy from or to it.
    last: Option<Event>,
    element: PhantomData<T>,
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
        Ok(bytemuck::cast_slice(self.memory.bytes()))
    }

    /// The contents to be changed, once the last copy has run.
    ///
    /// # Errors
    /// The device has failed.
    pub fn edit(&mut self) -> Result<&mut [T]> {
        self.settle()?;
        Ok(bytemuck::cast_slice_mut(self.memory.bytes_mut()))
    }

    /// Lets a copy on `stream` wait for the last one, which may be on another: so the event of the next one
    /// is that of both.
    pub(super) fn begin(&self, stream: &Stream) -> Result<()> {
        self.last.as_ref().map_or(Ok(()), |last| stream.wait(last))
    }

    /// Remembers the copy that was just queued on `stream`.
    pub(super) fn end(&mut self, stream: &Stream) -> Result<()> {
        match stream.record() {
            Ok(event) => self.last = Some(event),
            // Without an event to wait for later, the copy is waited for now.
            Err(error) => return stream.synchronize().and(Err(error)),
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        match &self.last {
            Some(event) => event.synchronize()?,
            None => return Ok(()),
        }
        self.last = None;
        Ok(())
    }
}

impl<T: Pod> Drop for Pinned<T> {
    fn drop(&mut self) {
        // A failed device has stopped copying, so there is nothing left to wait for.
        let _ = self.settle();
    }
}
