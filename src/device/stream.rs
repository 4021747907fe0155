//! Streams, events and captured graphs.

#[cfg(feature = "emulator")]
use super::emulated;
use super::handle::RawStream;
use super::{Backend, Device, cuda};
use crate::{Error, Result};

/// A queue of work: what is on one stream runs in order, different streams run beside each other.
pub struct Stream {
    inner: Inner,
    device: Device,
}

enum Inner {
    Cuda(cuda::Stream),
    #[cfg(feature = "emulator")]
    Emulator(emulated::Stream),
}

impl Device {
    /// A new stream, which waits for no other.
    ///
    /// # Errors
    /// The device has failed.
    pub fn stream(&self) -> Result<Stream> {
        let inner = match self.backend() {
            Backend::Cuda(memory) => Inner::Cuda(cuda::Stream::new(memory.context())?),
            #[cfg(feature = "emulator")]
            Backend::Emulator(memory) => Inner::Emulator(emulated::Stream::new(&memory.0)),
        };
        Ok(Stream { inner, device: self.clone() })
    }
}

impl Stream {
    /// The handle for raw launches, valid as long as the stream.
    pub fn raw(&self) -> RawStream {
        match &self.inner {
            Inner::Cuda(stream) => stream.raw(),
            #[cfg(feature = "emulator")]
            Inner::Emulator(stream) => stream.raw(),
        }
    }

    /// The device it belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Waits until everything on the stream has run.
    ///
    /// # Errors
    /// What went wrong in a kernel.
    pub fn synchronize(&self) -> Result<()> {
        self.refuse_capture("waiting for the stream")?;
        match &self.inner {
            Inner::Cuda(stream) => stream.synchronize(),
            #[cfg(feature = "emulator")]
            Inner::Emulator(_) => Ok(()),
        }
    }

    /// An event that happens once everything queued so far has run.
    ///
    /// # Errors
    /// The device has failed.
    pub fn record(&self) -> Result<Event> {
        match &self.inner {
            Inner::Cuda(stream) => Ok(Event(EventInner::Cuda(stream.record()?))),
            #[cfg(feature = "emulator")]
            Inner::Emulator(_) => Ok(Event(EventInner::Emulator(emulated::Event::now()))),
        }
    }

    /// Lets what is queued from now on wait for `event`.
    ///
    /// # Errors
    /// The device has failed.
    pub fn wait(&self, event: &Event) -> Result<()> {
        match (&self.inner, &event.0) {
            (Inner::Cuda(stream), EventInner::Cuda(event)) => stream.wait(event),
            #[cfg(feature = "emulator")]
            (Inner::Emulator(_), EventInner::Emulator(_)) => Ok(()),
            #[cfg(feature = "emulator")]
            _ => Err(elsewhere()),
        }
    }

    /// From here on launches are recorded instead of run, until [`end_capture`](Self::end_capture).
    ///
    /// # Errors
    /// A capture that is already under way.
    pub fn begin_capture(&self) -> Result<()> {
        self.refuse_capture("another capture")?;
        match (&self.inner, self.device.backend()) {
            (Inner::Cuda(stream), Backend::Cuda(memory)) => {
                stream.begin_capture()?;
                memory.capture_begins();
            }
            #[cfg(feature = "emulator")]
            (Inner::Emulator(stream), _) => stream.begin_capture(),
            #[cfg(feature = "emulator")]
            _ => return Err(elsewhere()),
        }
        Ok(())
    }

    /// Ends the capture. The graph repeats the recorded launches with the same arguments: what is to
    /// change between replays lies in device memory.
    ///
    /// # Errors
    /// No capture is under way, or something was done that cannot be captured.
    pub fn end_capture(&self) -> Result<Graph> {
        if !self.is_capturing()? {
            return Err(Error::usage("no capture is under way on this stream; begin one first"));
        }
        let inner = match (&self.inner, self.device.backend()) {
            (Inner::Cuda(stream), Backend::Cuda(memory)) => {
                let graph = stream.end_capture();
                memory.capture_ends();
                GraphInner::Cuda(graph?)
            }
            #[cfg(feature = "emulator")]
            (Inner::Emulator(stream), _) => GraphInner::Emulator(stream.end_capture()),
            #[cfg(feature = "emulator")]
            _ => return Err(elsewhere()),
        };
        Ok(Graph { inner, device: self.device.clone() })
    }

    fn is_capturing(&self) -> Result<bool> {
        match &self.inner {
            Inner::Cuda(stream) => stream.is_capturing(),
            #[cfg(feature = "emulator")]
            Inner::Emulator(stream) => Ok(stream.is_capturing()),
        }
    }

    /// What cannot be part of a graph is an error while one is captured.
    pub(super) fn refuse_capture(&self, what: &str) -> Result<()> {
        if self.is_capturing()? {
            return Err(Error::usage(format!("{what} cannot be captured; end the capture first")));
        }
        Ok(())
    }
}

/// Streams, events and graphs stay on their device.
#[cfg(feature = "emulator")]
fn elsewhere() -> Error {
    Error::usage("a stream, event or graph of one device cannot be used with one of another device")
}

/// A point on a stream.
pub struct Event(EventInner);

enum EventInner {
    Cuda(cuda::Event),
    #[cfg(feature = "emulator")]
    Emulator(emulated::Event),
}

impl Event {
    /// Waits until it has happened.
    ///
    /// # Errors
    /// What went wrong in a kernel before it.
    pub fn synchronize(&self) -> Result<()> {
        match &self.0 {
            EventInner::Cuda(event) => event.synchronize(),
            #[cfg(feature = "emulator")]
            EventInner::Emulator(_) => Ok(()),
        }
    }

    /// Milliseconds from `self` to `end`, once both have happened.
    ///
    /// # Errors
    /// What went wrong in a kernel before them.
    pub fn elapsed_ms(&self, end: &Event) -> Result<f32> {
        match (&self.0, &end.0) {
            (EventInner::Cuda(start), EventInner::Cuda(end)) => start.elapsed_ms(end),
            #[cfg(feature = "emulator")]
            (EventInner::Emulator(start), EventInner::Emulator(end)) => Ok(start.elapsed_ms(end)),
            #[cfg(feature = "emulator")]
            _ => Err(elsewhere()),
        }
    }
}

/// Recorded launches, run as one.
pub struct Graph {
    inner: GraphInner,
    device: Device,
}

enum GraphInner {
    Cuda(cuda::Graph),
    #[cfg(feature = "emulator")]
    Emulator(emulated::Graph),
}

impl Graph {
    /// Queues the whole graph on `stream`.
    ///
    /// # Errors
    /// The device has failed.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        match (&self.inner, &stream.inner) {
            (GraphInner::Cuda(graph), Inner::Cuda(stream)) => graph.launch(stream),
            #[cfg(feature = "emulator")]
            (GraphInner::Emulator(graph), Inner::Emulator(stream)) => graph.launch(stream),
            #[cfg(feature = "emulator")]
            _ => Err(elsewhere()),
        }
    }

    /// The device it was recorded on.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
