//! Ranks as threads of one process: for the CPU device, for several ranks on one GPU, and for tests.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::group::Group;
use super::inbox::{Inbox, Parcel};
use super::transport::{self, Activity, Fault, Transport, silence};
use crate::error::{Error, Result};

/// How long a rank waits for a silent one unless said otherwise: that of PyTorch's NCCL groups.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// How long the other ranks have, once one has failed, to end what they do and say the same.
const GRACE: Duration = Duration::from_secs(5);

/// Links and arithmetic of simulated ranks. Every ordered pair of ranks has a link of its own, which carries
/// one message after another. Time is counted, not spent: a rank's clock moves by what it computes and by what
/// it waits for, so results do not depend on the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Simulation {
    /// Seconds from the last byte sent to the last byte received.
    pub latency: f64,
    /// Bytes a second of a link.
    pub bandwidth: f64,
    /// FLOPs a second of a rank, in matrix products; nothing else takes time.
    pub flops: f64,
}

/// Ranks to be started as threads.
#[derive(Clone, Copy, Debug)]
pub struct Ranks {
    size: usize,
    timeout: Duration,
    simulation: Option<Simulation>,
}

impl Ranks {
    /// `size` ranks.
    pub fn new(size: usize) -> Self {
        Self { size, timeout: DEFAULT_TIMEOUT, simulation: None }
    }

    /// A rank that is silent for so long ends all others.
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Counts the time that messages and products would take.
    pub fn simulated(self, simulation: Simulation) -> Self {
        Self { simulation: Some(simulation), ..self }
    }

    /// Runs `f` on every rank, and returns the results in their order.
    ///
    /// A rank that returns an error or panics ends all others. One that never returns cannot be ended: after
    /// the failure that it is named in, it is waited for five seconds at most, and then left behind.
    ///
    /// # Errors
    /// The error of all ranks where they return the same; otherwise the first failure, which names its rank.
    pub fn run<T, F>(self, f: F) -> Result<Vec<T>>
    where
        T: Send + 'static,
        F: Fn(&Group) -> Result<T> + Send + Sync + 'static,
    {
        if self.size == 0 {
            return Err(Error::usage("there must be at least one rank"));
        }
        let shared = Arc::new(Shared::new(self));
        let f = Arc::new(f);
        let (sender, results) = channel();
        for rank in 0..self.size {
            let (transport, f, sender) = (Threads::new(rank, shared.clone()), f.clone(), sender.clone());
            let body = move || {
                let group = Group::world(Arc::new(transport));
                let result = group.run(|group| f(group));
                drop(group);
                // Nobody listens where this rank was left behind.
                let _ = sender.send((rank, result));
            };
            if let Err(error) = std::thread::Builder::new().name(format!("rank {rank}")).spawn(body) {
                let fault = Fault::failure(format!("rank {rank} cannot be started: {error}"));
                shared.fail(&fault);
                return Err(fault.error());
            }
        }
        drop(sender);

        let mut done: Vec<Option<Result<T>>> = (0..self.size).map(|_| None).collect();
        let mut deadline: Option<Instant> = None;
        loop {
            let next = match deadline {
                None => results.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => results.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            };
            let Ok((rank, result)) = next else { break };
            if result.is_err() && deadline.is_none() {
                deadline = Some(transport::deadline(self.timeout.min(GRACE)));
            }
            done[rank] = Some(result);
        }
        self.joined(done, &shared)
    }

    fn joined<T>(&self, done: Vec<Option<Result<T>>>, shared: &Shared) -> Result<Vec<T>> {
        let mut values = Vec::with_capacity(self.size);
        let mut errors = Vec::new();
        for result in done.into_iter().flatten() {
            match result {
                Ok(value) => values.push(value),
                Err(error) => errors.push(error),
            }
        }
        if values.len() == self.size {
            return Ok(values);
        }
        let alike = errors.windows(2).all(|pair| pair[0].to_string() == pair[1].to_string());
        match errors.pop() {
            // Of those that have returned: a stalled one has not.
            Some(error) if alike => Err(error),
            _ => Err(shared.fault().map_or_else(|| Error::failure("a rank was lost"), |fault| fault.error())),
        }
    }
}

/// Runs `f` on `size` ranks, each a thread, with the default timeout; see [`Ranks::run`].
///
/// # Errors
/// Those of [`Ranks::run`].
pub fn run_ranks<T, F>(size: usize, f: F) -> Result<Vec<T>>
where
    T: Send + 'static,
    F: Fn(&Group) -> Result<T> + Send + Sync + 'static,
{
    Ranks::new(size).run(f)
}

/// What the threads have in common.
struct Shared {
    config: Ranks,
    inboxes: Vec<Inbox>,
    /// For whom each rank waits.
    waits: Mutex<Vec<Option<usize>>>,
    fault: Mutex<Option<Fault>>,
}

impl Shared {
    fn new(config: Ranks) -> Self {
        Self {
            config,
            inboxes: (0..config.size).map(|_| Inbox::new(config.size)).collect(),
            waits: Mutex::new(vec![None; config.size]),
            fault: Mutex::new(None),
        }
    }

    /// Locked while all are told, so that all are told the same.
    fn fail(&self, fault: &Fault) {
        let mut first = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(fault.clone());
            self.inboxes.iter().for_each(|inbox| _ = inbox.fail(fault));
        }
    }

    fn fault(&self) -> Option<Fault> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn waits(&self) -> MutexGuard<'_, Vec<Option<usize>>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Simulated time of a rank.
struct Clock {
    now: f64,
    /// When the link to each rank has sent what it was given.
    free: Vec<f64>,
}

struct Threads {
    rank: usize,
    shared: Arc<Shared>,
    clock: Mutex<Clock>,
}

impl Threads {
    fn new(rank: usize, shared: Arc<Shared>) -> Self {
        let clock = Mutex::new(Clock { now: 0.0, free: vec![0.0; shared.config.size] });
        Self { rank, shared, clock }
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a message of `bytes` that is posted now arrives at `to`.
    fn arrival(&self, to: usize, bytes: usize) -> f64 {
        let Some(link) = self.shared.config.simulation else { return 0.0 };
        let mut clock = self.clock();
        clock.free[to] = clock.free[to].max(clock.now) + bytes as f64 / link.bandwidth;
        clock.free[to] + link.latency
    }
}

impl Transport for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.config.size
    }

    fn timeout(&self) -> Duration {
        self.shared.config.timeout
    }

    fn post(&self, to: usize, channel: u64, bytes: &[u8]) -> Result<()> {
        if let Some(fault) = self.shared.fault() {
            return Err(fault.error());
        }
        let parcel = Parcel { bytes: bytes.to_vec(), arrival: self.arrival(to, bytes.len()) };
        self.shared.inboxes[to].deliver(self.rank, channel, parcel);
        Ok(())
    }

    fn receive(&self, from: usize, channel: u64) -> Result<Vec<u8>> {
        self.shared.waits()[self.rank] = Some(from);
        let taken = self.shared.inboxes[self.rank].take(from, channel, self.timeout());
        let end = |fault: &Fault| {
            self.shared.fail(fault);
            // An earlier one may have ended the ranks.
            self.shared.fault().unwrap_or_else(|| fault.clone()).error()
        };
        let Some(parcel) = taken.map_err(|fault| end(&fault))? else {
            let waits = self.shared.waits().clone();
            let activity = |rank: usize| waits[rank].map_or(Activity::Busy, Activity::WaitsFor);
            return Err(end(&Fault::failure(silence(self.rank, from, self.timeout(), activity))));
        };
        self.shared.waits()[self.rank] = None;
        let mut clock = self.clock();
        clock.now = clock.now.max(parcel.arrival);
        Ok(parcel.bytes)
    }

    fn fail(&self, fault: &Fault) {
        self.shared.fail(fault);
    }

    fn fault(&self) -> Option<Fault> {
        self.shared.fault()
    }

    fn work(&self, flops: f64) {
        if let Some(simulation) = self.shared.config.simulation {
            self.clock().now += flops / simulation.flops;
        }
    }

    fn clock(&self) -> Option<f64> {
        self.shared.config.simulation.map(|_| self.clock().now)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.inboxes.iter().for_each(|inbox| inbox.end(self.rank));
    }
}
