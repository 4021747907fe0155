//! Captures of the emulator's streams, and the graphs that they become.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::queues::Operation;
use super::{Host, Recorded};
use crate::Result;
use crate::device::RawStream;
use crate::device::backend;

/// Something that was captured.
#[derive(Clone)]
enum Node {
    Launch(Recorded),
    Later(Operation),
    /// Waits until another branch has come to `position`.
    After {
        branch: usize,
        position: u64,
    },
}

/// A capture under way. Branch 0 is the stream on which it was begun; the others joined by waiting for an event of it.
#[derive(Default)]
pub struct Capture {
    state: Mutex<Captured>,
    ended: AtomicBool,
}

#[derive(Clone, Default)]
struct Captured {
    /// In the order in which they were issued, each on its branch.
    nodes: Vec<(usize, Node)>,
    /// Of each branch, how many operations it has queued.
    queued: Vec<u64>,
}

impl Capture {
    fn state(&self) -> MutexGuard<'_, Captured> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_over(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// A new branch.
    pub fn join(&self) -> usize {
        let mut state = self.state();
        state.queued.push(0);
        state.queued.len() - 1
    }

    /// How many operations a branch has queued.
    pub fn position(&self, branch: usize) -> u64 {
        self.state().queued[branch]
    }

    pub fn launch(&self, branch: usize, launch: Recorded) {
        self.state().nodes.push((branch, Node::Launch(launch)));
    }

    pub fn later(&self, branch: usize, operation: Operation) {
        let mut state = self.state();
        state.nodes.push((branch, Node::Later(operation)));
        state.queued[branch] += 1;
    }

    pub fn after(&self, branch: usize, other: usize, position: u64) {
        if branch != other {
            let mut state = self.state();
            state.nodes.push((branch, Node::After { branch: other, position }));
            state.queued[branch] += 1;
        }
    }

    /// The graph of all branches.
    pub fn end(&self, host: &Host) -> Graph {
        self.ended.store(true, Ordering::Release);
        let captured = self.state().clone();
        let branches = captured.queued.iter().skip(1).map(|_| host.queues.open()).collect();
        Graph { host: host.clone(), captured, branches }
    }
}

/// What was captured, and a stream for each branch but the first.
pub struct Graph {
    host: Host,
    captured: Captured,
    branches: Vec<u64>,
}

impl backend::Graph for Graph {
    fn launch(&self, stream: RawStream) -> Result<()> {
        let queues = &self.host.queues;
        let origin = self.host.number(stream);
        // A launch without a stream of ours has nothing queued before it.
        let own = origin.unwrap_or_else(|| queues.open());
        let of = |branch: usize| if branch == 0 { own } else { self.branches[branch - 1] };
        let before: Vec<u64> =
            (0..self.captured.queued.len()).map(|branch| queues.queued(of(branch))).collect();
        // Branches begin when the stream has come so far.
        for branch in 1..before.len() {
            queues.push_after(of(branch), own, before[0]);
        }
        let before: Vec<u64> = (0..before.len()).map(|branch| queues.queued(of(branch))).collect();
        let outcome = self.captured.nodes.iter().try_for_each(|(branch, node)| {
            match node {
                Node::Launch(launch) => {
                    queues.finish(of(*branch))?;
                    launch.run(&self.host, Some(of(*branch)))?;
                }
                Node::Later(operation) => queues.push(of(*branch), *operation),
                // Pushed even if it has come so far, for positions count it.
                Node::After { branch: other, position } => {
                    let position = before[*other] + position;
                    queues.push(of(*branch), Operation::After { stream: of(*other), position });
                }
            }
            Ok(())
        });
        if origin.is_none() {
            queues.close(own);
        }
        outcome
    }

    fn operations(&self) -> Result<usize> {
        Ok(self.captured.nodes.len())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.branches.iter().for_each(|&branch| self.host.queues.close(branch));
    }
}
