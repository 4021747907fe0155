//! The emulator as a device: everything on a stream runs when it is issued, a capture keeps launches for
//! later.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::emulator::{Emulator, EmulatorOptions};
use super::{DeviceInfo, Launch, RawStream};
use crate::{Error, Result};

/// What kernels are told about the device: a Hopper GPU, apart from what the options say.
pub(super) fn describe(options: &EmulatorOptions) -> DeviceInfo {
    DeviceInfo {
        name: "emulator".into(),
        capability: options.capability,
        multiprocessors: 132,
        shared_per_block: options.shared_per_block,
        shared_per_multiprocessor: options.shared_per_block + 1024,
        l2_bytes: 50 << 20,
        memory_bytes: 16 << 30,
        clock_khz: 0,
        driver: None,
    }
}

/// Memory of the emulator, which is memory of the host.
pub(super) struct Memory(pub Arc<Emulator>);

impl Memory {
    /// Writes zeros.
    ///
    /// # Safety
    /// The range is an allocation that nobody else uses at this moment; so below.
    pub(super) unsafe fn zero(&self, address: u64, bytes: usize) {
        // SAFETY: as the caller promises.
        unsafe { (address as *mut u8).write_bytes(0, bytes) };
    }

    /// # Safety
    /// As for [`zero`](Self::zero).
    pub(super) unsafe fn copy_in(&self, address: u64, host: &[u8]) {
        // SAFETY: as the caller promises; an allocation never overlaps a slice.
        unsafe { (address as *mut u8).copy_from_nonoverlapping(host.as_ptr(), host.len()) };
    }

    /// # Safety
    /// As for [`zero`](Self::zero).
    pub(super) unsafe fn copy_out(&self, host: &mut [u8], address: u64) {
        // SAFETY: as above.
        unsafe { (address as *const u8).copy_to_nonoverlapping(host.as_mut_ptr(), host.len()) };
    }
}

/// A stream. Its address is the raw handle, so it lies on the heap.
pub(super) struct Stream {
    emulator: Arc<Emulator>,
    queue: Box<Queue>,
}

/// The launches of the capture under way.
#[derive(Default)]
struct Queue(Mutex<Option<Vec<Recorded>>>);

impl Queue {
    fn capture(&self) -> MutexGuard<'_, Option<Vec<Recorded>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Recorded {
    name: String,
    launch: Launch,
    params: Vec<u8>,
}

impl Recorded {
    fn run(&self, emulator: &Emulator) -> Result<()> {
        let Launch { grid, threads, shared_bytes, cluster, dependent: _ } = self.launch;
        if cluster > 1 {
            return Err(Error::failure(format!(
                "{} runs in clusters, which the emulator does not have",
                self.name
            )));
        }
        // SAFETY: whoever launched it answered for its parameters.
        let outcome = unsafe { emulator.launch(&self.name, grid, threads, shared_bytes, &self.params) };
        outcome.map_err(Error::failure)
    }
}

/// Runs a kernel, or adds it to the capture of its stream.
///
/// # Safety
/// As for `Kernels::launch`.
pub(super) unsafe fn launch<P: Copy>(
    emulator: &Emulator,
    name: &str,
    launch: Launch,
    stream: RawStream,
    params: &P,
) -> Result<()> {
    let mut bytes = vec![0; size_of::<P>()];
    // SAFETY: both are as long as `P`. What lies in its padding, if it has any, is read by nobody.
    unsafe {
        std::ptr::from_ref(params).cast::<u8>().copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len());
    }
    let recorded = Recorded { name: name.into(), launch, params: bytes };
    // SAFETY: the caller promises a live stream of this device, or null.
    let queue = unsafe { stream.0.cast::<Queue>().as_ref() };
    if let Some(queue) = queue
        && let Some(captured) = queue.capture().as_mut()
    {
        captured.push(recorded);
        return Ok(());
    }
    recorded.run(emulator)
}

impl Stream {
    pub(super) fn new(emulator: &Arc<Emulator>) -> Self {
        Self { emulator: emulator.clone(), queue: Box::default() }
    }

    pub(super) fn raw(&self) -> RawStream {
        RawStream(std::ptr::from_ref::<Queue>(&self.queue).cast_mut().cast::<c_void>())
    }

    pub(super) fn is_capturing(&self) -> bool {
        self.queue.capture().is_some()
    }

    pub(super) fn begin_capture(&self) {
        *self.queue.capture() = Some(Vec::new());
    }

    pub(super) fn end_capture(&self) -> Graph {
        Graph(self.queue.capture().take().unwrap_or_default())
    }
}

/// The launches of a capture.
pub(super) struct Graph(Vec<Recorded>);

impl Graph {
    pub(super) fn launch(&self, stream: &Stream) -> Result<()> {
        self.0.iter().try_for_each(|recorded| recorded.run(&stream.emulator))
    }
}

/// When everything before it had run.
pub(super) struct Event(Instant);

impl Event {
    pub(super) fn now() -> Self {
        Self(Instant::now())
    }

    pub(super) fn elapsed_ms(&self, end: &Self) -> f32 {
        end.0.saturating_duration_since(self.0).as_secs_f32() * 1000.0
    }
}
