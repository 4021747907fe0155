//! Streams, events and captured graphs.

use super::backend::{self, elsewhere};
use super::{Buffer, Device, RawStream};
use crate::{Error, Result};

/// A queue of work: what is on one stream runs in order, different streams run beside each other.
pub struct Stream {
    inner: Box<dyn backend::Stream>,
    device: Device,
}

impl Device {
    /// A new stream, which waits for no other.
    ///
    /// # Errors
    /// The device has failed.
    pub fn stream(&self) -> Result<Stream> {
        Ok(Stream { inner: self.backend().stream()?, device: self.clone() })
    }

    /// A stream that another engine has made and keeps, also while that engine captures it: launches then become part of
    /// its graph. Dropping it destroys nothing. The null stream of the emulator, which has none, becomes a stream of its
    /// own.
    ///
    /// # Errors
    /// A stream of another context or device.
    ///
    /// # Safety
    /// `raw` is a live stream, and stays so until the result is dropped.
    pub unsafe fn borrow_stream(&self, raw: RawStream) -> Result<Stream> {
        // SAFETY: as the caller promises.
        Ok(Stream { inner: unsafe { self.backend().borrow_stream(raw)? }, device: self.clone() })
    }
}

impl Stream {
    /// The handle for raw launches, valid as long as the stream.
    pub fn raw(&self) -> RawStream {
        self.inner.raw()
    }

    /// The device it belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Waits until everything on the stream has run.
    ///
    /// # Errors
    /// What went wrong in a kernel; what kernels found wrong with their operands ([`Fault`](super::Fault)); a
    /// stream that is being captured.
    pub fn synchronize(&self) -> Result<()> {
        self.refuse_capture("waiting for the stream")?;
        let faults = self.device.faults().live();
        faults.iter().try_for_each(|fault| fault.fetch(self))?;
        self.inner.synchronize()?;
        faults.iter().try_for_each(|fault| fault.tell())
    }

    /// An event that happens once everything queued so far has run.
    ///
    /// # Errors
    /// The device has failed.
    pub fn record(&self) -> Result<Event> {
        self.inner.record().map(Event)
    }

    /// Lets what is queued from now on wait for `event`.
    ///
    /// # Errors
    /// An event of another kind of device; the device has failed.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.inner.wait(event.0.as_ref())
    }

    /// Writes `value` to element `index` of `words`, once everything queued so far has run. Whoever sees the value and
    /// then reads at the scope of the system (a kernel that acquires so, a stream that [waits](Self::wait_value32), a
    /// copy) sees what was written before it on this stream. No multiprocessor is needed for it, so a kernel that waits
    /// for the value holds up nothing. A replayed graph writes the same value again.
    ///
    /// # Errors
    /// No such element, words of another device, a device that has failed.
    pub fn write_value32(&self, words: &Buffer<i32>, index: usize, value: i32) -> Result<()> {
        let word = self.word(words, index)?;
        // SAFETY: the word lies in the buffer.
        unsafe { self.inner.write_value(word, value) }
    }

    /// Lets what is queued from now on wait until element `index` of `words` is at least `value`: until their
    /// difference, as an `i32` that wraps around, is not negative. What was written before the value by those who release
    /// at the scope of the system is then seen. On the emulator, what writes it is queued before anything waits for this
    /// stream.
    ///
    /// # Errors
    /// As for [`write_value32`](Self::write_value32).
    pub fn wait_value32(&self, words: &Buffer<i32>, index: usize, value: i32) -> Result<()> {
        let word = self.word(words, index)?;
        // SAFETY: the word lies in the buffer.
        unsafe { self.inner.wait_value(word, value) }
    }

    fn word(&self, words: &Buffer<i32>, index: usize) -> Result<u64> {
        if !self.device.is(words.device()) {
            return Err(elsewhere());
        }
        if index >= words.len() {
            return Err(Error::usage(format!(
                "element {index} of a buffer of {} words cannot be written or waited for; choose one of them",
                words.len()
            )));
        }
        Ok(words.ptr().offset(index).address())
    }

    /// From here on launches are recorded instead of run, until [`end_capture`](Self::end_capture).
    ///
    /// # Errors
    /// A capture that is already under way; the device has failed.
    pub fn begin_capture(&self) -> Result<()> {
        self.refuse_capture("another capture")?;
        self.inner.begin_capture()
    }

    /// Ends the capture. The graph repeats the recorded launches with the same arguments: what is to
    /// change between replays lies in device memory.
    ///
    /// # Errors
    /// No capture is under way, or something was done that cannot be captured.
    pub fn end_capture(&self) -> Result<Graph> {
        if !self.inner.is_capturing()? {
            return Err(Error::usage("no capture is under way on this stream; begin one first"));
        }
        Ok(Graph { inner: self.inner.end_capture()?, device: self.device.clone() })
    }

    /// What cannot be part of a graph is an error while one is captured.
    pub(crate) fn refuse_capture(&self, what: &str) -> Result<()> {
        if self.inner.is_capturing()? {
            return Err(Error::usage(format!("{what} cannot be captured; end the capture first")));
        }
        Ok(())
    }
}

/// A point on a stream.
pub struct Event(Box<dyn backend::Event>);

impl Event {
    /// Waits until it has happened.
    ///
    /// # Errors
    /// What went wrong in a kernel before it.
    pub fn synchronize(&self) -> Result<()> {
        self.0.synchronize()
    }

    /// Milliseconds from `self` to `end`, once both have happened.
    ///
    /// # Errors
    /// An event of another kind of device; what went wrong in a kernel before them.
    pub fn elapsed_ms(&self, end: &Event) -> Result<f32> {
        self.0.elapsed_ms(end.0.as_ref())
    }
}

/// Recorded launches, run as one.
pub struct Graph {
    inner: Box<dyn backend::Graph>,
    device: Device,
}

impl Graph {
    /// Queues the whole graph on `stream`.
    ///
    /// # Errors
    /// A stream of another device; the device has failed.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        if !self.device.is(&stream.device) {
            return Err(elsewhere());
        }
        self.inner.launch(stream.raw())
    }

    /// How many launches, copies and other operations it consists of.
    ///
    /// # Errors
    /// The device has failed.
    pub fn operations(&self) -> Result<usize> {
        self.inner.operations()
    }

    /// The device it was recorded on.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
