//! A device on which nothing runs: what is made on it tells how much memory a run needs on such a device.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytemuck::Zeroable;

use super::backend::{self, own};
use super::words::Words;
use super::{Device, DeviceInfo, Kernels, Launch, RawStream, TensorBoxes, TensorMap};
use crate::{Error, Result};

/// Alignment of an allocation, as on every device.
const ALIGN: u64 = 256;

impl Device {
    /// A device like `info` on which nothing runs. Buffers have addresses but no memory, so a run can be laid out
    /// on it as on a GPU, and [`allocated_bytes`](Self::allocated_bytes) then tells what it takes. Copies to it
    /// are forgotten, copies from it are zeros, streams and graphs have nothing to do, and a launch is an error.
    pub fn planned(info: DeviceInfo) -> Self {
        let name = info.name.clone();
        Self::new(Kernels::new(Box::new(NoKernels { name }), info), Box::new(Nothing(AtomicU64::new(ALIGN))))
    }
}

/// Memory that is not there, by the next address.
struct Nothing(AtomicU64);

impl backend::Backend for Nothing {
    fn alloc(&self, bytes: usize) -> Result<u64> {
        let after = |address: u64| {
            (bytes as u64).checked_next_multiple_of(ALIGN).and_then(|bytes| address.checked_add(bytes))
        };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, after).map_err(|_| {
            Error::failure(format!(
                "{bytes} bytes more cannot be planned for: no device has so many addresses"
            ))
        })
    }

    unsafe fn free(&self, _: u64) {}

    unsafe fn lend(&self, _: u64, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn zero(&self, _: u64, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn upload(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    unsafe fn download(&self, host: &mut [u8], _: u64) -> Result<()> {
        host.fill(0);
        Ok(())
    }

    unsafe fn copy_in(&self, _: RawStream, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    unsafe fn copy_out(&self, _: RawStream, host: &mut [u8], _: u64) -> Result<()> {
        host.fill(0);
        Ok(())
    }

    unsafe fn copy(&self, _: RawStream, _: u64, _: u64, _: usize) -> Result<()> {
        Ok(())
    }

    fn pinned(&self, bytes: usize) -> Result<Box<dyn backend::HostMemory>> {
        Ok(Box::new(Words::new(bytes)?))
    }

    fn stream(&self) -> Result<Box<dyn backend::Stream>> {
        Ok(Box::new(Stream { capturing: AtomicBool::new(false) }))
    }

    unsafe fn borrow_stream(&self, _: RawStream) -> Result<Box<dyn backend::Stream>> {
        self.stream()
    }
}

/// Refuses every launch on the device of this name.
struct NoKernels {
    name: String,
}

impl backend::Loaded for NoKernels {
    unsafe fn launch(&self, name: &str, _: Launch, _: RawStream, _: *const c_void, _: usize) -> Result<()> {
        Err(Error::failure(format!(
            "the kernel {name} cannot be launched: {} is only planned for, and nothing runs on it",
            self.name
        )))
    }

    fn tensor_map(&self, _: &TensorBoxes<'_>) -> Result<TensorMap> {
        // Nothing reads it.
        Ok(TensorMap::zeroed())
    }
}

struct Stream {
    capturing: AtomicBool,
}

impl backend::Stream for Stream {
    fn raw(&self) -> RawStream {
        RawStream(std::ptr::null_mut())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn write_value(&self, _: u64, _: i32) -> Result<()> {
        Ok(())
    }

    unsafe fn wait_value(&self, _: u64, _: i32) -> Result<()> {
        Ok(())
    }

    fn record(&self) -> Result<Box<dyn backend::Event>> {
        Ok(Box::new(Event))
    }

    fn wait(&self, event: &dyn backend::Event) -> Result<()> {
        own::<Event>(event).map(drop)
    }

    fn begin_capture(&self) -> Result<()> {
        self.capturing.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn is_capturing(&self) -> Result<bool> {
        Ok(self.capturing.load(Ordering::Relaxed))
    }

    fn end_capture(&self) -> Result<Box<dyn backend::Graph>> {
        self.capturing.store(false, Ordering::Relaxed);
        Ok(Box::new(Graph))
    }
}

struct Event;

impl backend::Event for Event {
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn elapsed_ms(&self, end: &dyn backend::Event) -> Result<f32> {
        own::<Event>(end).map(|_| 0.0)
    }
}

struct Graph;

impl backend::Graph for Graph {
    fn launch(&self, _: RawStream) -> Result<()> {
        Ok(())
    }

    fn operations(&self) -> Result<usize> {
        Ok(0)
    }
}
