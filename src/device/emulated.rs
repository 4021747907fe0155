//! The emulator as a device: a launch runs when it is issued, copies within the device and operations on words when
//! something waits for them or beside a launch; a capture keeps all of them for later.

mod graph;
mod queues;

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use super::backend::{self, own};
use super::emulator::{Emulator, EmulatorOptions};
use super::words::Words;
use super::{DeviceInfo, Launch, RawStream, TensorBoxes, TensorMap};
use crate::{Error, Result};
use graph::Capture;
use queues::{Operation, Others, Queues};

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
pub(super) struct Host {
    emulator: Arc<Emulator>,
    queues: Arc<Queues>,
    streams: Arc<Mutex<Streams>>,
}

/// The streams that live, by their handles.
type Streams = HashMap<usize, Weak<StreamState>>;

impl Host {
    pub(super) fn new(options: EmulatorOptions) -> Self {
        Self { emulator: Arc::new(Emulator::new(options)), queues: Arc::default(), streams: Arc::default() }
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of a stream of ours; none for the default stream.
    fn state(&self, stream: RawStream) -> Option<&StreamState> {
        // SAFETY: whoever hands out a raw stream promises that it is a live one of this device, or null.
        unsafe { stream.0.cast::<StreamState>().as_ref() }
    }

    /// Its number among the queues.
    fn number(&self, stream: RawStream) -> Option<u64> {
        self.state(stream).map(|state| state.number)
    }

    /// Runs what the stream has queued.
    fn finish(&self, stream: RawStream) -> Result<()> {
        self.number(stream).map_or(Ok(()), |number| self.queues.finish(number))
    }
}

impl backend::Backend for Host {
    fn alloc(&self, bytes: usize) -> Result<u64> {
        Ok(self.emulator.alloc(bytes))
    }

    unsafe fn free(&self, address: u64) {
        self.queues.forget(&[(address, address + self.emulator.bytes_at(address) as u64)]);
        self.emulator.free(address);
    }

    unsafe fn lend(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.emulator.lend(address, bytes) };
        Ok(())
    }

    fn give_back(&self, address: u64, bytes: usize) {
        let ended = self.emulator.give_back(address, bytes);
        self.queues.forget(&ended);
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
        self.queues.finish_all()?;
        // SAFETY: as above.
        unsafe { (address as *const u8).copy_to_nonoverlapping(host.as_mut_ptr(), host.len()) };
        Ok(())
    }

    unsafe fn copy_in(&self, stream: RawStream, address: u64, host: &[u8]) -> Result<()> {
        self.finish(stream)?;
        // SAFETY: as the caller promises.
        unsafe { self.upload(address, host) }
    }

    unsafe fn copy_out(&self, stream: RawStream, host: &mut [u8], address: u64) -> Result<()> {
        self.finish(stream)?;
        // SAFETY: as above.
        unsafe { (address as *const u8).copy_to_nonoverlapping(host.as_mut_ptr(), host.len()) };
        Ok(())
    }

    unsafe fn copy(&self, stream: RawStream, to: u64, from: u64, bytes: usize) -> Result<()> {
        let copy = Operation::Copy { to, from, bytes };
        match self.state(stream) {
            Some(state) => state.later(&self.queues, copy),
            None => {
                let queue = self.queues.open();
                self.queues.push(queue, copy);
                self.queues.close(queue);
            }
        }
        Ok(())
    }

    fn pinned(&self, bytes: usize) -> Result<Box<dyn backend::HostMemory>> {
        Ok(Box::new(Words::new(bytes)?))
    }

    fn stream(&self) -> Result<Box<dyn backend::Stream>> {
        let state = Arc::new(StreamState { number: self.queues.open(), branch: Mutex::default() });
        self.streams().insert(state.handle(), Arc::downgrade(&state));
        Ok(Box::new(Stream { host: self.clone(), state, lent: false }))
    }

    unsafe fn borrow_stream(&self, raw: RawStream) -> Result<Box<dyn backend::Stream>> {
        if raw.0.is_null() {
            return self.stream();
        }
        let state = self.streams().get(&raw.0.addr()).and_then(Weak::upgrade);
        let state = state.ok_or_else(|| {
            Error::usage("the stream is none of this emulator; lend one of its own, or the null stream")
        })?;
        Ok(Box::new(Stream { host: self.clone(), state, lent: true }))
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
        let recorded = Recorded { name: name.into(), launch, params: params.into() };
        if let Some((capture, branch)) = self.state(stream).and_then(StreamState::captured) {
            capture.launch(branch, recorded);
            return Ok(());
        }
        self.finish(stream)?;
        recorded.run(self, self.number(stream))
    }

    fn tensor_map(&self, boxes: &TensorBoxes) -> Result<TensorMap> {
        Ok(self.emulator.tensor_map(boxes))
    }
}

/// A stream. The address of its state is the raw handle, so that lies on the heap.
struct Stream {
    host: Host,
    state: Arc<StreamState>,
    /// Whether another handle ends it.
    lent: bool,
}

/// Its number among the queues, and the branch that it is of a capture.
struct StreamState {
    number: u64,
    branch: Mutex<Option<(Arc<Capture>, usize)>>,
}

impl StreamState {
    fn handle(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    fn branch(&self) -> MutexGuard<'_, Option<(Arc<Capture>, usize)>> {
        self.branch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The capture under way that it belongs to.
    fn captured(&self) -> Option<(Arc<Capture>, usize)> {
        self.branch().clone().filter(|(capture, _)| !capture.is_over())
    }

    /// Queues or captures an operation.
    fn later(&self, queues: &Queues, operation: Operation) {
        match self.captured() {
            Some((capture, branch)) => capture.later(branch, operation),
            None => queues.push(self.number, operation),
        }
    }
}

#[derive(Clone)]
struct Recorded {
    name: String,
    launch: Launch,
    params: Vec<u8>,
}

impl Recorded {
    fn run(&self, host: &Host, stream: Option<u64>) -> Result<()> {
        let mut others = Others { queues: &host.queues, stream };
        // SAFETY: whoever launched it answered for its parameters.
        let outcome =
            unsafe { host.emulator.launch_beside(&self.name, self.launch, &self.params, &mut others) };
        outcome.map_err(Error::failure)
    }
}

impl backend::Stream for Stream {
    fn raw(&self) -> RawStream {
        RawStream(Arc::as_ptr(&self.state).cast_mut().cast())
    }

    fn synchronize(&self) -> Result<()> {
        self.host.queues.finish(self.state.number)
    }

    unsafe fn write_value(&self, word: u64, value: i32) -> Result<()> {
        self.state.later(&self.host.queues, Operation::Write { word, value });
        Ok(())
    }

    unsafe fn wait_value(&self, word: u64, value: i32) -> Result<()> {
        self.state.later(&self.host.queues, Operation::Wait { word, value });
        Ok(())
    }

    fn record(&self) -> Result<Box<dyn backend::Event>> {
        let captured = self.state.captured().map(|(capture, branch)| {
            let position = capture.position(branch);
            (capture, branch, position)
        });
        let (host, stream) = (self.host.clone(), self.state.number);
        let position = host.queues.queued(stream);
        Ok(Box::new(Event { time: Instant::now(), host, stream, position, captured }))
    }

    fn wait(&self, event: &dyn backend::Event) -> Result<()> {
        let event = own::<Event>(event)?;
        let Some((capture, other, position)) = &event.captured else {
            match self.state.captured() {
                // No part of the graph: it is over before that is launched.
                Some(_) => self.host.queues.settle(event.stream, event.position)?,
                None => self.host.queues.push_after(self.state.number, event.stream, event.position),
            }
            return Ok(());
        };
        let branch = match self.state.captured() {
            Some((own, branch)) if Arc::ptr_eq(&own, capture) => branch,
            None if !capture.is_over() => {
                let branch = capture.join();
                *self.state.branch() = Some((capture.clone(), branch));
                branch
            }
            _ => return Err(Error::usage("an event of a capture can only be waited for in that capture")),
        };
        capture.after(branch, *other, *position);
        Ok(())
    }

    fn begin_capture(&self) -> Result<()> {
        let capture = Arc::new(Capture::default());
        let branch = capture.join();
        *self.state.branch() = Some((capture, branch));
        Ok(())
    }

    fn is_capturing(&self) -> Result<bool> {
        Ok(self.state.captured().is_some())
    }

    fn end_capture(&self) -> Result<Box<dyn backend::Graph>> {
        let Some((capture, branch)) = self.state.captured() else {
            return Err(Error::usage("no capture is under way on this stream; begin one first"));
        };
        if branch != 0 {
            return Err(Error::usage(
                "the capture was begun on another stream, which this one has waited for; end it there",
            ));
        }
        Ok(Box::new(capture.end(&self.host)))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.lent {
            self.host.streams().remove(&self.state.handle());
            self.host.queues.close(self.state.number);
        }
    }
}

/// When everything before it had run, or is to have.
struct Event {
    time: Instant,
    host: Host,
    stream: u64,
    position: u64,
    /// The place in a capture, and the branch and the number of operations before it.
    captured: Option<(Arc<Capture>, usize, u64)>,
}

impl backend::Event for Event {
    fn synchronize(&self) -> Result<()> {
        self.host.queues.settle(self.stream, self.position)
    }

    fn elapsed_ms(&self, end: &dyn backend::Event) -> Result<f32> {
        let end = own::<Event>(end)?;
        self.synchronize()?;
        end.synchronize()?;
        Ok(end.time.saturating_duration_since(self.time).as_secs_f32() * 1000.0)
    }
}
