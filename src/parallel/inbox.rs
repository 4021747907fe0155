//! Messages that have arrived at a rank and that it has not taken yet.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::transport::{Fault, deadline};

/// A message.
#[derive(Debug)]
pub(super) struct Parcel {
    pub bytes: Vec<u8>,
    /// When it arrives on the receiver's simulated clock; 0 where time is not simulated.
    pub arrival: f64,
}

/// Queues by sender and channel.
pub(super) struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queues: HashMap<(usize, u64), VecDeque<Parcel>>,
    ended: Vec<bool>,
    fault: Option<Fault>,
}

impl Inbox {
    /// An empty one for a world of `size` ranks.
    pub fn new(size: usize) -> Self {
        let state = State { ended: vec![false; size], ..State::default() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The state stays whole where a holder panics: every change to it is one statement.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a message of `from` in.
    pub fn deliver(&self, from: usize, channel: u64, parcel: Parcel) {
        self.state().queues.entry((from, channel)).or_default().push_back(parcel);
        self.changed.notify_all();
    }

    /// `rank` will send nothing more.
    pub fn end(&self, rank: usize) {
        self.state().ended[rank] = true;
        self.changed.notify_all();
    }

    /// Whether `rank` has said that it will send nothing more.
    pub fn has_ended(&self, rank: usize) -> bool {
        self.state().ended[rank]
    }

    /// Ends the receiver with `fault`; true for the first one, which is the one that is reported.
    pub fn fail(&self, fault: &Fault) -> bool {
        let mut state = self.state();
        let first = state.fault.is_none();
        if first {
            state.fault = Some(fault.clone());
        }
        drop(state);
        self.changed.notify_all();
        first
    }

    /// What ended the receiver.
    pub fn fault(&self) -> Option<Fault> {
        self.state().fault.clone()
    }

    /// The next message of `from`; `None` where there is none within `timeout`.
    ///
    /// # Errors
    /// What ended the ranks, or that `from` has ended.
    pub fn take(&self, from: usize, channel: u64, timeout: Duration) -> Result<Option<Parcel>, Fault> {
        let deadline = deadline(timeout);
        let mut state = self.state();
        loop {
            if let Some(fault) = &state.fault {
                return Err(fault.clone());
            }
            if let Some(parcel) = state.queues.get_mut(&(from, channel)).and_then(VecDeque::pop_front) {
                return Ok(Some(parcel));
            }
            if state.ended[from] {
                return Err(Fault::ended(from));
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return Ok(None) };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
