//! Streams, events and graphs of a GPU.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::result;
use cudarc::driver::sys::{
    self, CUevent, CUevent_flags, CUevent_wait_flags, CUgraph, CUgraphExec, CUgraphInstantiate_flags,
    CUstream, CUstreamCaptureMode, CUstreamCaptureStatus, CUstreamWaitValue_flags, CUstreamWriteValue_flags,
};

use super::context::Context;
use super::driver::failed;
use crate::device::RawStream;
use crate::device::backend::{self, own};
use crate::{Error, Result};

pub(super) struct Stream {
    raw: CUstream,
    /// Whether a capture was begun here. One that was begun elsewhere captures this stream too while it waits
    /// for events of it.
    begun: AtomicBool,
    /// Whether somebody else destroys it.
    lent: bool,
    context: Arc<Context>,
}

struct Event {
    raw: CUevent,
    context: Arc<Context>,
}

struct Graph {
    graph: CUgraph,
    executable: CUgraphExec,
    /// Among the graphs of the context, which keeps the memory that it uses.
    number: u64,
    context: Arc<Context>,
}

// SAFETY: streams, events and graphs of the driver may be used from any thread; a graph is not changed
// once it is made.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}
// SAFETY: as above.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}
// SAFETY: as above; it is not Sync, since two threads may not launch one graph at once.
unsafe impl Send for Graph {}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self> {
        context.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking);
        let raw = raw.map_err(failed("no stream can be made on the GPU"))?;
        Ok(Self { raw, begun: AtomicBool::new(false), lent: false, context: context.clone() })
    }

    /// A stream of somebody else, once it is known to be of this context.
    ///
    /// # Safety
    /// It outlives what is returned.
    pub(super) unsafe fn borrow(context: &Arc<Context>, raw: CUstream) -> Result<Self> {
        context.bind()?;
        let mut owner = std::ptr::null_mut();
        // SAFETY: the caller promises that the stream is alive.
        let outcome = unsafe { sys::cuStreamGetCtx(raw, &raw mut owner) }.result();
        outcome.map_err(failed("a stream does not tell its context"))?;
        if !context.is(owner) {
            return Err(Error::usage(
                "the stream belongs to another CUDA context than the device; lend a stream of the context that was \
                 current when the device was made",
            ));
        }
        Ok(Self { raw, begun: AtomicBool::new(false), lent: true, context: context.clone() })
    }

    /// What a capture that was begun here has recorded.
    fn graph(&self) -> Result<Graph> {
        // SAFETY: the stream is alive and captured.
        let graph = unsafe { result::stream::end_capture(self.raw) };
        let graph = graph.map_err(failed("the capture of a graph has failed"))?;
        if graph.is_null() {
            return Err(Error::failure(
                "the capture of a graph has failed: something in it cannot be captured",
            ));
        }
        // SAFETY: the graph was just made, and is destroyed once: here, or when `Graph` is dropped.
        unsafe {
            match result::graph::instantiate(graph, CUgraphInstantiate_flags(0)) {
                Ok(executable) => {
                    let (number, context) = (self.context.graphs().add(), self.context.clone());
                    Ok(Graph { graph, executable, number, context })
                }
                Err(error) => {
                    let _ = result::graph::destroy(graph);
                    Err(failed("a captured graph cannot be made ready")(error))
                }
            }
        }
    }
}

impl backend::Stream for Stream {
    fn raw(&self) -> RawStream {
        RawStream(self.raw.cast())
    }

    fn synchronize(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the stream is alive, here and below.
        unsafe { result::stream::synchronize(self.raw) }.map_err(failed("the GPU has failed"))
    }

    unsafe fn write_value(&self, word: u64, value: i32) -> Result<()> {
        self.context.bind()?;
        let flags = CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
        // SAFETY: the stream is alive; the caller answers for the word.
        unsafe { sys::cuStreamWriteValue32_v2(self.raw, word, value as u32, flags) }
            .result()
            .map_err(failed("a stream cannot write a word"))
    }

    unsafe fn wait_value(&self, word: u64, value: i32) -> Result<()> {
        self.context.bind()?;
        let flags = CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
        // SAFETY: as above.
        unsafe { sys::cuStreamWaitValue32_v2(self.raw, word, value as u32, flags) }
            .result()
            .map_err(failed("a stream cannot wait for a word"))
    }

    fn record(&self) -> Result<Box<dyn backend::Event>> {
        self.context.bind()?;
        let raw = result::event::create(CUevent_flags::CU_EVENT_DEFAULT);
        let event = Event {
            raw: raw.map_err(failed("no event can be made on the GPU"))?,
            context: self.context.clone(),
        };
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(event.raw, self.raw) }
            .map_err(failed("an event cannot be recorded"))?;
        Ok(Box::new(event))
    }

    fn wait(&self, event: &dyn backend::Event) -> Result<()> {
        let event = own::<Event>(event)?;
        self.context.bind()?;
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream are alive; the driver keeps what it needs of a destroyed event.
        unsafe { result::stream::wait_event(self.raw, event.raw, flags) }
            .map_err(failed("a stream cannot wait for an event"))
    }

    fn begin_capture(&self) -> Result<()> {
        self.context.bind()?;
        // Relaxed, because the first launch of a kernel loads its code, which the other modes forbid.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(self.raw, mode) }
            .map_err(failed("a graph cannot be captured"))?;
        self.context.captures.fetch_add(1, Ordering::SeqCst);
        self.begun.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn is_capturing(&self) -> Result<bool> {
        self.context.bind()?;
        // SAFETY: the stream is alive.
        let status = unsafe { result::stream::is_capturing(self.raw) };
        let status = status.map_err(failed("a stream does not tell whether it is captured"))?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    fn end_capture(&self) -> Result<Box<dyn backend::Graph>> {
        self.context.bind()?;
        if !self.begun.swap(false, Ordering::SeqCst) {
            return Err(Error::usage(
                "the capture was begun on another stream, which this one has waited for; end it there",
            ));
        }
        let graph = self.graph();
        // Only now, when the graph is counted: in between its memory could be freed.
        self.context.captures.fetch_sub(1, Ordering::SeqCst);
        graph.map(|graph| Box::new(graph) as Box<dyn backend::Graph>)
    }
}

impl backend::Event for Event {
    fn synchronize(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.raw) }.map_err(failed("the GPU has failed"))
    }

    fn elapsed_ms(&self, end: &dyn backend::Event) -> Result<f32> {
        let end = own::<Event>(end)?;
        self.synchronize()?;
        end.synchronize()?;
        // SAFETY: both events are alive.
        unsafe { result::event::elapsed(self.raw, end.raw) }.map_err(failed("two events cannot be timed"))
    }
}

impl backend::Graph for Graph {
    fn launch(&self, stream: RawStream) -> Result<()> {
        self.context.bind()?;
        // SAFETY: graph and stream are alive; the launches in it were promised to be valid.
        unsafe { result::graph::launch(self.executable, stream.0.cast()) }
            .map_err(failed("a graph cannot be launched"))
    }

    fn operations(&self) -> Result<usize> {
        self.context.bind()?;
        let mut count = 0;
        // SAFETY: the graph is alive; without room for the nodes the driver tells their number.
        unsafe { sys::cuGraphGetNodes(self.graph, ptr::null_mut(), &raw mut count) }
            .result()
            .map_err(failed("a graph cannot be counted"))?;
        Ok(count)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Memory is not freed while a capture is under way, so an abandoned one is ended; there is none to end
        // where none was begun.
        drop(backend::Stream::end_capture(self));
        if self.lent {
            return;
        }
        // SAFETY: made in `new`; the driver lets queued work finish.
        self.context.within(|| unsafe {
            let _ = result::stream::destroy(self.raw);
        });
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `record`.
        self.context.within(|| unsafe {
            let _ = result::event::destroy(self.raw);
        });
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `end_capture`; the driver lets a running graph finish.
        self.context.within(|| unsafe {
            let _ = result::graph::exec_destroy(self.executable);
            let _ = result::graph::destroy(self.graph);
        });
        self.context.graphs().remove(self.number);
    }
}
