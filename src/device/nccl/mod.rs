//! NCCL: what connects the GPUs of different ranks. Nothing here waits for a GPU but the making and the end of a
//! communicator; everything that is queued can be captured into a graph.

mod library;

use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytemuck::Pod;

use library::{Comm, Config, IN_PROGRESS, Outcome, SUCCESS, SUM};
pub use library::{Nccl, UniqueId};

use super::{Buffer, Device, Stream};
use crate::{Error, Result};

/// How long the end of a communicator waits for one who is just queueing: he may be waiting for a rank that has gone.
const PATIENCE: Duration = Duration::from_millis(250);

/// What sums take buffers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataType {
    /// `ncclFloat32`.
    F32,
    /// `ncclBfloat16`.
    Bf16,
}

impl DataType {
    fn code(self) -> c_int {
        match self {
            Self::F32 => 7,
            Self::Bf16 => 9,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// `ncclUint8`: what only moves, moves as bytes.
const BYTES: c_int = 1;

/// One direction of an exchange: what is sent to one rank, and taken from another.
pub struct Leg<'a> {
    /// Receiver, and what it gets.
    pub send: (usize, &'a Buffer<u8>),
    /// Sender, and where it goes.
    pub receive: (usize, &'a Buffer<u8>),
}

/// One rank's end of a communicator. One thread queues at a time; others may ask for errors and abort.
pub struct Communicator {
    nccl: &'static Nccl,
    raw: Comm,
    device: Device,
    size: usize,
    queueing: Mutex<()>,
    aborted: AtomicBool,
}

// SAFETY: NCCL asks that calls which queue are not made at the same time, which the mutex sees to.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Connects this rank, and waits until the others do the same. An operation takes at most `blocks` thread blocks,
    /// where that is given.
    ///
    /// # Errors
    /// What NCCL says.
    pub fn connect(
        nccl: &'static Nccl,
        device: &Device,
        id: UniqueId,
        [size, rank]: [usize; 2],
        blocks: Option<u32>,
    ) -> Result<Self> {
        device.backend().bind()?;
        let (mut raw, mut config) = (ptr::null_mut(), Config::new(blocks));
        // SAFETY: writes the communicator, for the GPU that is current on this thread.
        let outcome = unsafe {
            (nccl.functions.comm_init_rank)(&raw mut raw, size as c_int, id, rank as c_int, &raw mut config)
        };
        nccl.check(outcome, ptr::null_mut(), "connect the ranks")?;
        let (queueing, aborted) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self { nccl, raw, device: device.clone(), size, queueing, aborted })
    }

    /// Queues by `call`, unless the communicator was aborted.
    fn queue(&self, what: &str, stream: &Stream, call: impl FnOnce() -> Outcome) -> Result<()> {
        assert!(stream.device().is(&self.device), "a stream of the communicator's device");
        let _alone = self.queueing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.aborted.load(Ordering::SeqCst) {
            return Err(Error::failure(format!("NCCL cannot {what}: the communicator was aborted")));
        }
        self.device.backend().bind()?;
        let outcome = call();
        if self.aborted.load(Ordering::SeqCst) {
            return Err(Error::failure(format!(
                "NCCL cannot {what}: the communicator was aborted meanwhile"
            )));
        }
        self.nccl.check(outcome, self.raw, what)
    }

    /// Queues `all = [mine of rank 0 | mine of rank 1 | …]`; `mine` may be this rank's part of `all`.
    ///
    /// # Errors
    /// What NCCL says.
    pub fn all_gather<T: Pod>(&self, stream: &Stream, all: &Buffer<T>, mine: &Buffer<T>) -> Result<()> {
        assert_eq!(all.len(), self.size * mine.len(), "all-gather: length of the result");
        let (send, receive) = (address(mine).cast_const(), address(all));
        // SAFETY: live buffers of this length, here and below; the stream orders their later use.
        self.queue("queue an all-gather", stream, || unsafe {
            let bytes = mine.len() * size_of::<T>();
            (self.nccl.functions.all_gather)(send, receive, bytes, BYTES, self.raw, stream.raw().0)
        })
    }

    /// Queues `mine = Σ_ranks all[part of this rank]`; `mine` may be that part.
    ///
    /// # Errors
    /// What NCCL says.
    pub fn reduce_scatter<T: Pod>(
        &self,
        stream: &Stream,
        mine: &Buffer<T>,
        all: &Buffer<T>,
        of: DataType,
    ) -> Result<()> {
        assert_eq!(all.len(), self.size * mine.len(), "reduce-scatter: length of the operand");
        assert_eq!(size_of::<T>(), of.bytes());
        let (send, receive) = (address(all).cast_const(), address(mine));
        // SAFETY: as above.
        self.queue("queue a reduce-scatter", stream, || unsafe {
            let call = self.nccl.functions.reduce_scatter;
            call(send, receive, mine.len(), of.code(), SUM, self.raw, stream.raw().0)
        })
    }

    /// Queues `data = Σ_ranks data`.
    ///
    /// # Errors
    /// What NCCL says.
    pub fn all_reduce<T: Pod>(&self, stream: &Stream, data: &Buffer<T>, of: DataType) -> Result<()> {
        assert_eq!(size_of::<T>(), of.bytes());
        let place = address(data);
        // SAFETY: as above.
        self.queue("queue an all-reduce", stream, || unsafe {
            let call = self.nccl.functions.all_reduce;
            call(place.cast_const(), place, data.len(), of.code(), SUM, self.raw, stream.raw().0)
        })
    }

    /// Queues `data` of rank `root` to all.
    ///
    /// # Errors
    /// What NCCL says.
    pub fn broadcast<T: Pod>(&self, stream: &Stream, data: &Buffer<T>, root: usize) -> Result<()> {
        let (place, bytes) = (address(data), data.len() * size_of::<T>());
        // SAFETY: as above.
        self.queue("queue a broadcast", stream, || unsafe {
            let call = self.nccl.functions.broadcast;
            call(place.cast_const(), place, bytes, BYTES, root as c_int, self.raw, stream.raw().0)
        })
    }

    /// Queues all `legs` as one operation, in which none waits for another.
    ///
    /// # Errors
    /// What NCCL says.
    pub fn exchange(&self, stream: &Stream, legs: &[Leg<'_>]) -> Result<()> {
        let f = &self.nccl.functions;
        let leg = |leg: &Leg<'_>| {
            let Leg { send: (to, send), receive: (from, receive) } = leg;
            // SAFETY: as above.
            let [sent, received] = unsafe {
                let raw = stream.raw().0;
                [
                    (f.send)(address(send).cast_const(), send.len(), BYTES, *to as c_int, self.raw, raw),
                    (f.receive)(address(receive), receive.len(), BYTES, *from as c_int, self.raw, raw),
                ]
            };
            if sent == SUCCESS { received } else { sent }
        };
        // SAFETY: every group that is begun is ended, on the same thread.
        self.queue("queue an exchange", stream, || unsafe {
            let begun = (f.group_start)();
            if begun != SUCCESS {
                return begun;
            }
            let queued = legs.iter().map(leg).find(|&outcome| outcome != SUCCESS);
            let ended = (f.group_end)();
            queued.unwrap_or(ended)
        })
    }

    /// What has gone wrong since, on the GPU or in the network.
    ///
    /// # Errors
    /// It.
    pub fn check(&self) -> Result<()> {
        if self.aborted.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut error = SUCCESS;
        // SAFETY: the communicator is alive, for whoever aborts it is the only one who asks.
        let outcome = unsafe { (self.nccl.functions.comm_get_async_error)(self.raw, &raw mut error) };
        let error = if outcome == SUCCESS { error } else { outcome };
        let error = if error == IN_PROGRESS { SUCCESS } else { error };
        self.nccl.check(error, self.raw, "go on")
    }

    /// Ends everything that is queued, so that no stream waits for a rank that has gone; results are undefined. Not to
    /// be called while another thread asks for errors. Returns when graphs that were captured with the communicator are
    /// gone.
    pub fn abort(&self) {
        if self.aborted.swap(true, Ordering::SeqCst) {
            return;
        }
        // Whoever is queueing may have to be ended himself.
        let deadline = Instant::now() + PATIENCE;
        let mut alone = self.queueing.try_lock();
        while alone.is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
            alone = self.queueing.try_lock();
        }
        let _ = self.device.backend().bind();
        // SAFETY: once, and nothing is queued after it.
        let _ = unsafe { (self.nccl.functions.comm_abort)(self.raw) };
    }
}

impl Drop for Communicator {
    /// Waits for what is queued, unless it was aborted, and for the end of graphs.
    fn drop(&mut self) {
        if !self.aborted.load(Ordering::SeqCst) && self.device.backend().bind().is_ok() {
            // SAFETY: made in `connect`, and nobody has it any more.
            let _ = unsafe { (self.nccl.functions.comm_destroy)(self.raw) };
        }
    }
}

/// Where a buffer lies, as NCCL takes it.
fn address<T: Pod>(buffer: &Buffer<T>) -> *mut std::ffi::c_void {
    ptr::with_exposed_provenance_mut(buffer.ptr().address() as usize)
}
