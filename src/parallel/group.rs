//! A process group: ranks that exchange messages and compute together.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytemuck::Pod;

use super::transport::{Fault, Transport};
use crate::error::{Error, Result};
use crate::hash::fnv1a;

/// What a group did, in order; see [`Group::log`].
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A message left for this rank of the group.
    Posted {
        /// Receiver.
        to: usize,
        /// Size.
        bytes: usize,
    },
    /// A message of this rank is waited for from here on.
    Awaited {
        /// Sender.
        from: usize,
    },
    /// And here it was.
    Received {
        /// Sender.
        from: usize,
        /// Size.
        bytes: usize,
    },
    /// A matrix product of a ring's step begins.
    ProductStarted {
        /// Step of the ring.
        step: usize,
    },
    /// And ends.
    ProductEnded {
        /// Step of the ring.
        step: usize,
    },
}

/// An [`Event`] with the simulated time at which it happened, 0 where time is not simulated.
#[derive(Clone, Debug, PartialEq)]
pub struct Logged {
    /// What happened.
    pub event: Event,
    /// Seconds.
    pub at: f64,
}

/// One rank's end of a process group, whatever carries the messages: threads
/// ([`Ranks`](super::Ranks)) or processes ([`tcp`](super::tcp)).
///
/// All members call the collectives in the same order. Every call returns an error where a member is gone,
/// has failed, or has been silent beyond the timeout: one sentence that names the rank. It is the first that a
/// rank learns of, and so the same on all unless two things go wrong at once. After it the world has ended, and
/// every further call returns it again.
///
/// A group belongs to one thread at a time; groups of the same ranks under other names
/// ([`subgroup`](Self::subgroup)) may be used by others at the same time.
pub struct Group {
    transport: Arc<dyn Transport>,
    members: Vec<usize>,
    rank: usize,
    channel: u64,
    sent: RefCell<Vec<u64>>,
    log: RefCell<Option<Vec<Logged>>>,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("rank", &self.rank).field("members", &self.members).finish()
    }
}

impl Group {
    /// The group of all ranks.
    pub(super) fn world(transport: Arc<dyn Transport>) -> Self {
        let members = (0..transport.size()).collect();
        let rank = transport.rank();
        Self::new(transport, members, rank, fnv1a(b"world"))
    }

    fn new(transport: Arc<dyn Transport>, members: Vec<usize>, rank: usize, channel: u64) -> Self {
        let sent = RefCell::new(vec![0; members.len()]);
        Self { transport, members, rank, channel, sent, log: RefCell::new(None) }
    }

    /// This rank's number in the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks in the group.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// Number in the world of rank `rank` of this group.
    pub fn world_rank(&self, rank: usize) -> usize {
        self.members[rank]
    }

    /// The group of these ranks of this one, in this order. Messages of groups with different names or
    /// members do not mix. Sends nothing.
    ///
    /// # Errors
    /// Where a rank is named twice or is not in this group, or this rank is not among them.
    pub fn subgroup(&self, name: &str, ranks: &[usize]) -> Result<Self> {
        let members: Vec<usize> =
            ranks.iter().map(|&rank| self.members.get(rank).copied()).collect::<Option<_>>().ok_or_else(
                || {
                    Error::usage(format!(
                        "{ranks:?} cannot be group {name:?}: there are {} ranks, from 0",
                        self.size()
                    ))
                },
            )?;
        if (1..ranks.len()).any(|i| ranks[..i].contains(&ranks[i])) {
            return Err(Error::usage(format!("{ranks:?} cannot be group {name:?}: a rank is there twice")));
        }
        let Some(rank) = ranks.iter().position(|&rank| rank == self.rank) else {
            return Err(Error::usage(format!("rank {} is not in group {name:?} of {ranks:?}", self.rank)));
        };
        let channel = fnv1a(format!("{:016x} {name} {members:?}", self.channel).as_bytes());
        Ok(Self::new(self.transport.clone(), members, rank, channel))
    }

    /// Sends `data` to rank `to` and returns before it has arrived; `data` may change at once.
    ///
    /// # Errors
    /// The failure that has ended the ranks.
    ///
    /// # Panics
    /// If `to` is this rank or none of the group: a bug of the caller, not of a user.
    pub fn post<T: Pod>(&self, to: usize, data: &[T]) -> Result<()> {
        assert!(
            to < self.size() && to != self.rank,
            "rank {} posts to rank {to} of {}",
            self.rank,
            self.size()
        );
        let bytes: &[u8] = bytemuck::cast_slice(data);
        self.transport.post(self.members[to], self.channel, bytes)?;
        self.sent.borrow_mut()[to] += bytes.len() as u64;
        self.record(Event::Posted { to, bytes: bytes.len() });
        Ok(())
    }

    /// Waits for the next message of rank `from` and writes it to `into`.
    ///
    /// # Errors
    /// Where `from` is gone, silent beyond the timeout, or has sent something of another size.
    ///
    /// # Panics
    /// If `from` is this rank or none of the group: a bug of the caller, not of a user.
    pub fn receive<T: Pod>(&self, from: usize, into: &mut [T]) -> Result<()> {
        let bytes = self.receive_bytes(from)?;
        let into: &mut [u8] = bytemuck::cast_slice_mut(into);
        if bytes.len() != into.len() {
            return Err(self.end(&Fault::failure(format!(
                "rank {} has sent {} bytes where rank {} expects {}: their programs or recipes differ",
                self.members[from],
                bytes.len(),
                self.members[self.rank],
                into.len()
            ))));
        }
        into.copy_from_slice(&bytes);
        Ok(())
    }

    /// The next message of rank `from`, whatever its size.
    pub(super) fn receive_bytes(&self, from: usize) -> Result<Vec<u8>> {
        assert!(from < self.size() && from != self.rank, "rank {} awaits rank {from}", self.rank);
        self.record(Event::Awaited { from });
        let bytes = self.transport.receive(self.members[from], self.channel)?;
        self.record(Event::Received { from, bytes: bytes.len() });
        Ok(bytes)
    }

    /// What carries the messages, for a thread that watches over the ranks.
    pub(super) fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// Ends all ranks of the world.
    pub(super) fn end(&self, fault: &Fault) -> Error {
        self.transport.fail(fault);
        fault.error()
    }

    /// Runs `f`; where it returns an error or panics, all other ranks end with a message that names this one.
    ///
    /// # Errors
    /// That of `f`, or its panic.
    pub fn run<T>(&self, f: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let rank = self.members[self.rank];
        match catch_unwind(AssertUnwindSafe(|| f(self))) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                self.transport.fail(&Fault::failure(format!("rank {rank} failed: {error}")));
                Err(error)
            }
            Err(panic) => {
                let text = text_of(panic.as_ref());
                Err(self.end(&Fault::failure(format!("rank {rank} panicked: {text}"))))
            }
        }
    }

    /// Bytes sent so far to each rank of this group, through this group.
    pub fn sent(&self) -> Vec<u64> {
        self.sent.borrow().clone()
    }

    /// Begins to keep a record of what this group does.
    pub fn log(&self) {
        *self.log.borrow_mut() = Some(Vec::new());
    }

    /// What was done since [`log`](Self::log), which ends; empty where nothing was kept.
    pub fn take_log(&self) -> Vec<Logged> {
        self.log.borrow_mut().take().unwrap_or_default()
    }

    fn record(&self, event: Event) {
        if let Some(log) = self.log.borrow_mut().as_mut() {
            log.push(Logged { event, at: self.clock().unwrap_or(0.0) });
        }
    }

    /// Runs the products of a step of a ring, which take `flops`.
    pub(super) fn product<T>(&self, step: usize, flops: f64, f: impl FnOnce() -> T) -> T {
        self.record(Event::ProductStarted { step });
        let result = f();
        self.transport.work(flops);
        self.record(Event::ProductEnded { step });
        result
    }

    /// Takes the time that this rank needs for `flops`, where time is simulated.
    pub(crate) fn work(&self, flops: f64) {
        self.transport.work(flops);
    }

    /// Seconds since the start on this rank's simulated clock; `None` where time is not simulated.
    pub fn clock(&self) -> Option<f64> {
        self.transport.clock()
    }
}

/// What a panic said.
fn text_of(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
