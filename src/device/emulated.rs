//! The emulator as a device: everything on a stream runs when it is issued, a capture keeps launches and
//! copies on the device for later.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::backend::{self, own};
use super::emulator::{Emulator, EmulatorOptions};
use super::words::Words;
use super::{DeviceInfo, Launch, RawStream, TensorBoxes, TensorMap};
use crate::{Error, Result};

/// What kernels are told about the device: a Hopper GPU, apart from what the options say.
pub(super) fn describe(options: &EmulatorOptions) -> DeviceInfo {
    DeviceInfo {
        name: "emulator".into(),
        capability: options.capability,
        hopper: options.capability == (9, 0),
        shared_per_block: options.shared_per_block,
        shared_per_multiprocessor: options.shared_per_block + 1024,
        memory_bytes: 16 << 30,
        clock_khz: 0,
        ..DeviceInfo::h100()
    }
}

/// The emulator; its memory is memory of the host.
#[derive(Clone)]
pub(super) struct Host(pub Arc<Emulator>);

impl backend::Backend for Host {
    fn alloc(&self, bytes: usize) -> Result<u64> {
        Ok(self.0.alloc(bytes))
    }

    unsafe fn free(&self, address: u64) {
        self.0.free(address);
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller promises that the range is allocated, here and below; launches have run when
        // they return, so nothing else uses it.
        unsafe { (address as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn upload(&self, address: u64, host: &[u8]) -> Result<()> {
        // SAFETY: as above; an allocation never overlaps a slice.
        unsafe { (address as *mut u8).copy_from_nonoverlapping(host.as_ptr(), host.len()) };
        Ok(())
    }

    unsafe fn download(&self, host: &mut [u8], address: u64) -> Result<()> {
        // SAFETY: as above.
        unsafe { (address as *const u8).copy_to_nonoverlapping(host.as_mut_ptr(), host.len()) };
        Ok(())
    }

    unsafe fn copy_in(&self, _: RawStream, address: u64, host: &[u8]) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.upload(address, host) }
    }

    unsafe fn copy_out(&self, _: RawStream, host: &mut [u8], address: u64) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.download(host, address) }
    }

    unsafe fn copy(&self, stream: RawStream, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.queue(stream, Recorded::Copy { to, from, bytes }) }
    }

    fn pinned(&self, bytes: usize) -> Result<Box<dyn backend::HostMemory>> {
        Ok(Box::new(Words::new(bytes)?))
    }

    fn stream(&self) -> Result<Box<dyn backend::Stream>> {
        Ok(Box::new(Stream { host: self.clone(), queue: Box::default() }))
    }
}

impl backend::Loaded for Host {
    unsafe fn launch(
        &self,
        name: &str,
        launch: Launch,
        stream: RawStream,
        params: *const c_void,
        bytes: usize,
    ) -> Result<()> {
        // SAFETY: the caller promises `bytes` bytes.
        let params = unsafe { std::slice::from_raw_parts(params.cast::<u8>(), bytes) };
        let recorded = Recorded::Launch { name: name.into(), launch, params: params.into() };
        // SAFETY: the caller promises a live stream of this device, or null.
        unsafe { self.queue(stream, recorded) }
    }

    fn tensor_map(&self, boxes: &TensorBoxes) -> Result<TensorMap> {
        Ok(self.0.tensor_map(boxes))
    }
}

/// A stream. The address of its queue is the raw handle, so that lies on the heap.
struct Stream {
    host: Host,
    queue: Box<Queue>,
}

/// What the capture under way has recorded.
#[derive(Default)]
struct Queue(Mutex<Option<Vec<Recorded>>>);

impl Queue {
    fn capture(&self) -> MutexGuard<'_, Option<Vec<Recorded>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What runs when it is queued, or with a graph.
enum Recorded {
    Launch { name: String, launch: Launch, params: Vec<u8> },
    Copy { to: u64, from: u64, bytes: usize },
}

impl Recorded {
    fn run(&self, emulator: &Emulator) -> Result<()> {
        match self {
            Self::Launch { name, launch, params } => {
                // SAFETY: whoever launched it answered for its parameters.
                unsafe { emulator.launch(name, *launch, params) }.map_err(Error::failure)
            }
            &Self::Copy { to, from, bytes } => {
                // SAFETY: whoever queued it answered for both ranges.
                unsafe { emulator.copy(to, from, bytes) }.map_err(Error::failure)
            }
        }
    }
}

impl Host {
    /// Runs `work`, or keeps it where `stream` is captured.
    ///
    /// # Safety
    /// `stream` is null or a live stream of this device.
    unsafe fn queue(&self, stream: RawStream, work: Recorded) -> Result<()> {
        // SAFETY: as the caller promises.
        let queue = unsafe { stream.0.cast::<Queue>().as_ref() };
        match queue.map(Queue::capture).as_deref_mut() {
            Some(Some(captured)) => {
                captured.push(work);
                Ok(())
            }
            _ => work.run(&self.0),
        }
    }
}

impl backend::Stream for Stream {
    fn raw(&self) -> RawStream {
        RawStream(std::ptr::from_ref::<Queue>(&self.queue).cast_mut().cast())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn record(&self) -> Result<Box<dyn backend::Event>> {
        Ok(Box::new(Event(Instant::now())))
    }

    fn wait(&self, event: &dyn backend::Event) -> Result<()> {
        own::<Event>(event).map(drop)
    }

    fn begin_capture(&self) -> Result<()> {
        *self.queue.capture() = Some(Vec::new());
        Ok(())
    }

    fn is_capturing(&self) -> Result<bool> {
        Ok(self.queue.capture().is_some())
    }

    fn end_capture(&self) -> Result<Box<dyn backend::Graph>> {
        let recorded = self.queue.capture().take().unwrap_or_default();
        Ok(Box::new(Graph { host: self.host.clone(), recorded }))
    }
}

/// What a capture has recorded.
struct Graph {
    host: Host,
    recorded: Vec<Recorded>,
}

impl backend::Graph for Graph {
    fn launch(&self, _: RawStream) -> Result<()> {
        self.recorded.iter().try_for_each(|recorded| recorded.run(&self.host.0))
    }
}

/// When everything before it had run.
struct Event(Instant);

impl backend::Event for Event {
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn elapsed_ms(&self, end: &dyn backend::Event) -> Result<f32> {
        Ok(own::<Event>(end)?.0.saturating_duration_since(self.0).as_secs_f32() * 1000.0)
    }
}
