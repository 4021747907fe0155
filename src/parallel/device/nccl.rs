//! Collectives of ranks that have a GPU each, by NCCL: on one machine or several.
//!
//! The host group is the rendezvous, and what a rank hears of a failure by. A thread of each rank watches over both:
//! where the ranks have ended, NCCL has failed, or this rank has waited for longer than the timeout, it tells all and
//! aborts the communicator. Without that, whoever waits for a rank that has gone would wait on its GPU for ever.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytemuck::Pod;

use super::Exchange;
use crate::device::nccl::{Communicator, DataType, Leg, Nccl, UniqueId};
use crate::device::{Buffer, Device, Stream};
use crate::error::{Error, Result};
use crate::kernels::collective::Summed;
use crate::parallel::group::Group;
use crate::parallel::transport::{Fault, Transport};

/// How often the watching thread looks.
const PERIOD: Duration = Duration::from_millis(50);

pub(super) struct Connected {
    communicator: Arc<Communicator>,
    watch: Arc<Watch>,
    watching: Option<JoinHandle<()>>,
}

/// What a rank and the thread that watches over it have in common.
struct Watch {
    rank: usize,
    transport: Arc<dyn Transport>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Since when the rank has waited for NCCL.
    waiting: Option<Instant>,
    /// Whether something is queued that nobody has waited for.
    queued: bool,
    ended: bool,
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the communicator has to end.
    fn fault(&self, communicator: &Communicator, waiting: Option<Instant>) -> Option<Fault> {
        if let Some(fault) = self.transport.fault() {
            return Some(fault);
        }
        let (rank, timeout) = (self.rank, self.transport.timeout());
        if let Err(error) = communicator.check() {
            return Some(Fault::failure(format!("rank {rank}: {error}")));
        }
        waiting.filter(|since| since.elapsed() > timeout).map(|_| {
            Fault::failure(format!(
                "rank {rank} has waited for NCCL for {timeout:?}: a rank has stalled, or its program differs"
            ))
        })
    }

    /// Looks until the rank has ended, or everything has to.
    fn run(&self, communicator: &Communicator) {
        let mut state = self.state();
        while !state.ended {
            state = self.changed.wait_timeout(state, PERIOD).unwrap_or_else(PoisonError::into_inner).0;
            let waiting = state.waiting;
            drop(state);
            if let Some(fault) = self.fault(communicator, waiting) {
                self.transport.fail(&fault);
                return communicator.abort();
            }
            state = self.state();
        }
    }
}

impl Connected {
    /// Connects all ranks of `host`, each with a GPU of its own.
    pub(super) fn new(host: &Group, device: &Device, blocks: Option<u32>) -> Result<Self> {
        let rank = host.world_rank(host.rank());
        let named = |error: Error| match error {
            Error::Usage(text) => Error::Usage(format!("rank {rank}: {text}")),
            Error::Failure(text) => Error::Failure(format!("rank {rank}: {text}")),
        };
        let nccl = Nccl::open();
        host.agree(nccl.as_ref().map(drop).map_err(|error| named(Error::usage(error))))?;
        let nccl = nccl?;
        host.check_same("versions of NCCL", &nccl.version().to_string())?;

        let mut id = [0; 128];
        let mut outcome = Ok(());
        if host.rank() == 0 {
            outcome = nccl.unique_id().map(|UniqueId(made)| id = made).map_err(named);
        }
        host.agree(outcome)?;
        host.broadcast(&mut id, 0)?;
        let communicator = Arc::new(connect(host, nccl, device, UniqueId(id), blocks)?);

        let transport = host.transport().clone();
        let (state, changed) = (Mutex::default(), Condvar::new());
        let watch = Arc::new(Watch { rank, transport, state, changed });
        let (watcher, watched) = (watch.clone(), communicator.clone());
        let watching = std::thread::Builder::new()
            .name(format!("NCCL of rank {rank}"))
            .spawn(move || watcher.run(&watched))
            .map_err(|error| Error::failure(format!("NCCL of rank {rank} cannot be watched: {error}")))?;
        let connected = Self { communicator, watch, watching: Some(watching) };
        host.barrier()?;
        Ok(connected)
    }

    /// Runs what may wait for other ranks.
    pub(super) fn watched(&self, host: &Group, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.watch.state().waiting = Some(Instant::now());
        let result = work();
        self.watch.state().waiting = None;
        match (self.watch.transport.fault(), result) {
            (Some(fault), _) => Err(fault.error()),
            (None, Err(error)) => {
                let fault = Fault::failure(format!("rank {}: {error}", self.watch.rank));
                let error = host.end(&fault);
                // Another one may have been first.
                Err(self.watch.transport.fault().map_or(error, |fault| fault.error()))
            }
            (None, Ok(())) => Ok(()),
        }
    }

    fn queue(&self, host: &Group, work: impl FnOnce(&Communicator) -> Result<()>) -> Result<()> {
        self.watch.state().queued = true;
        self.watched(host, || work(&self.communicator))
    }

    /// Waits for `stream`, and no longer than the ranks live.
    pub(super) fn synchronize(&self, host: &Group, stream: &Stream) -> Result<()> {
        self.watched(host, || stream.synchronize())?;
        self.watch.state().queued = false;
        Ok(())
    }

    pub(super) fn all_gather<T: Pod>(
        &self,
        host: &Group,
        stream: &Stream,
        all: &Buffer<T>,
        mine: &Buffer<T>,
    ) -> Result<()> {
        self.queue(host, |communicator| communicator.all_gather(stream, all, mine))
    }

    pub(super) fn reduce_scatter<T: Summed>(
        &self,
        host: &Group,
        stream: &Stream,
        mine: &Buffer<T>,
        all: &Buffer<T>,
    ) -> Result<()> {
        self.queue(host, |communicator| communicator.reduce_scatter(stream, mine, all, data_type::<T>()))
    }

    pub(super) fn all_reduce<T: Summed>(
        &self,
        host: &Group,
        stream: &Stream,
        data: &Buffer<T>,
    ) -> Result<()> {
        self.queue(host, |communicator| communicator.all_reduce(stream, data, data_type::<T>()))
    }

    pub(super) fn broadcast<T: Pod>(
        &self,
        host: &Group,
        stream: &Stream,
        data: &Buffer<T>,
        root: usize,
    ) -> Result<()> {
        self.queue(host, |communicator| communicator.broadcast(stream, data, root))
    }

    pub(super) fn exchange<T: Pod>(
        &self,
        host: &Group,
        stream: &Stream,
        exchanges: &[Exchange<'_, T>],
    ) -> Result<()> {
        let bytes = |buffer: &Buffer<T>| buffer.view::<u8>(0..buffer.len() * size_of::<T>());
        let buffers = exchanges.iter().map(|one| Ok((bytes(one.send)?, bytes(one.receive)?)));
        let buffers = buffers.collect::<Result<Vec<_>>>()?;
        let leg = |(one, (send, receive)): (&Exchange<'_, T>, _)| Leg {
            send: (one.ahead(host), send),
            receive: (one.behind(host), receive),
        };
        let legs: Vec<_> =
            exchanges.iter().zip(buffers.iter().map(|(send, receive)| (send, receive))).map(leg).collect();
        self.queue(host, |communicator| communicator.exchange(stream, &legs))
    }
}

fn data_type<T: Summed>() -> DataType {
    if T::BF16 { DataType::Bf16 } else { DataType::F32 }
}

/// Connects this rank, as long as the others live. A connection that never comes about is left behind with its thread.
fn connect(
    host: &Group,
    nccl: &'static Nccl,
    device: &Device,
    id: UniqueId,
    blocks: Option<u32>,
) -> Result<Communicator> {
    let (rank, size, device) = (host.rank(), host.size(), device.clone());
    let world_rank = host.world_rank(rank);
    let fail = |what: String| host.end(&Fault::failure(format!("rank {world_rank} {what}")));
    let (sender, connected) = channel();
    let connecting = move || {
        // Nobody listens where this thread was left behind.
        let _ = sender.send(Communicator::connect(nccl, &device, id, [size, rank], blocks));
    };
    std::thread::Builder::new()
        .name(format!("connects rank {world_rank}"))
        .spawn(connecting)
        .map_err(|error| fail(format!("cannot be connected: {error}")))?;
    let (transport, began) = (host.transport(), Instant::now());
    loop {
        match connected.recv_timeout(PERIOD) {
            Ok(result) => {
                return result.map_err(|error| match transport.fault() {
                    Some(fault) => fault.error(),
                    None => fail(format!("cannot be connected: {error}")),
                });
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(fail("cannot be connected: NCCL has panicked".into()));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(fault) = transport.fault() {
            return Err(fault.error());
        }
        if began.elapsed() > transport.timeout() {
            return Err(fail(format!(
                "has waited for NCCL to connect the ranks for {:?}",
                transport.timeout()
            )));
        }
    }
}

impl Drop for Connected {
    /// Waits for what is queued, unless nobody can want it any more: then the others may have gone.
    fn drop(&mut self) {
        let mut state = self.watch.state();
        state.ended = true;
        let useless = state.queued || std::thread::panicking();
        drop(state);
        self.watch.changed.notify_all();
        if self.watch.transport.fault().is_some() || useless {
            // Where graphs of the communicator live, its end waits for theirs: so not here.
            let communicator = self.communicator.clone();
            let watching = self.watching.take();
            let ending = move || {
                let _ = watching.map(JoinHandle::join);
                communicator.abort();
            };
            drop(std::thread::Builder::new().name("end of NCCL".into()).spawn(ending));
        } else if let Some(watching) = self.watching.take() {
            let _ = watching.join();
        }
    }
}
