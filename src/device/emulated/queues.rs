//! What streams of the emulator have queued and not yet done: copies within the device and operations on words.
//!
//! A launch runs when it is issued, these run later: while kernels that other streams launch run, as early, as late or
//! as much at random as [`CopyPolicy`](super::super::emulator::CopyPolicy) says, and at the latest when their own stream
//! goes on, or somebody waits for it. So kernels meet flags that are raised late and in any order, as beside a GPU's
//! copy engines; but only what was queued before a launch happens beside it, by the same host thread, or where that comes
//! after it: ranks that are threads.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use crate::device::emulator::Beside;
use crate::{Error, Result};

/// Something that happens later, in the order of its stream.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// A copy of bytes that do not overlap.
    Copy { to: u64, from: u64, bytes: usize },
    /// A word becomes `value`.
    Write { word: u64, value: i32 },
    /// A word must be at least `value`.
    Wait { word: u64, value: i32 },
    /// So many operations of another stream must have run.
    After { stream: u64, position: u64 },
}

/// One stream.
struct Line {
    waiting: VecDeque<Operation>,
    /// Operations so far.
    queued: u64,
    /// Who queued the last one.
    thread: ThreadId,
    /// Whether the stream is still there.
    open: bool,
}

/// The streams of a device, by number.
#[derive(Default)]
pub struct Queues(Mutex<Table>);

#[derive(Default)]
struct Table {
    lines: BTreeMap<u64, Line>,
    next: u64,
}

impl Table {
    /// Operations of a stream that have run.
    fn position(&self, stream: u64) -> u64 {
        self.lines.get(&stream).map_or(u64::MAX, |line| line.queued - line.waiting.len() as u64)
    }

    /// Runs the next operation of a stream, where it can.
    fn step(&mut self, stream: u64) -> bool {
        let Some(&operation) = self.lines.get(&stream).and_then(|line| line.waiting.front()) else {
            return false;
        };
        match operation {
            // SAFETY: whoever queued it has promised that the ranges are allocated, here and below. Memory is freed
            // only when nothing is queued, and the kernels that run are those of this host thread.
            Operation::Copy { to, from, bytes } => unsafe {
                (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes);
            },
            // SAFETY: as above; words are aligned.
            Operation::Write { word, value } => unsafe { (word as *mut i32).write_volatile(value) },
            Operation::Wait { word, value } => {
                // SAFETY: as above.
                let held = unsafe { (word as *const i32).read_volatile() };
                if held.wrapping_sub(value) < 0 {
                    return false;
                }
            }
            Operation::After { stream, position } if self.position(stream) < position => return false,
            Operation::After { .. } => {}
        }
        if let Some(line) = self.lines.get_mut(&stream) {
            line.waiting.pop_front();
            if !line.open && line.waiting.is_empty() {
                self.lines.remove(&stream);
            }
        }
        true
    }

    /// Streams with operations that this host thread has queued.
    fn own(&self) -> Vec<u64> {
        let thread = thread::current().id();
        let own = self.lines.iter().filter(|(_, line)| line.thread == thread && !line.waiting.is_empty());
        own.map(|(&stream, _)| stream).collect()
    }

    /// Runs an operation that `stream` waits for, perhaps over others: of the stream that it is to come after, or of any
    /// that this host thread has.
    fn help(&mut self, stream: u64) -> bool {
        self.follow(stream) || self.own().into_iter().any(|other| self.step(other))
    }

    /// The first half of [`help`](Self::help).
    fn follow(&mut self, stream: u64) -> bool {
        let mut at = stream;
        // As many streams as there are, should they wait in a circle.
        for _ in 0..self.lines.len() {
            if self.step(at) {
                return true;
            }
            match self.lines.get(&at).and_then(|line| line.waiting.front()) {
                Some(&Operation::After { stream, .. }) => at = stream,
                _ => break,
            }
        }
        false
    }

    /// Runs a stream up to `position`, and others where it waits for them.
    fn settle(&mut self, stream: u64, position: u64) -> Result<()> {
        while self.position(stream) < position {
            if !self.help(stream) {
                return Err(Error::failure(format!(
                    "{}; nothing that was queued before changes that: on the emulator a launch or a write that ends a \
                     wait is queued before what waits for the waiting stream",
                    self.waits()
                )));
            }
        }
        Ok(())
    }

    /// What those streams wait for.
    fn waits(&self) -> String {
        let own = self.own();
        let heads = own.iter().filter_map(|stream| Some((stream, self.lines.get(stream)?.waiting.front()?)));
        let wait = |(stream, operation): (&u64, &Operation)| match *operation {
            Operation::Wait { word, value } => {
                // SAFETY: as in `step`.
                let held = unsafe { (word as *const i32).read_volatile() };
                format!(
                    "stream {stream} waits for the word at {word:#x} to be at least {value}, and it is {held}"
                )
            }
            Operation::After { stream: other, .. } => format!("stream {stream} waits for stream {other}"),
            _ => format!("stream {stream} can go on"),
        };
        heads.map(wait).collect::<Vec<_>>().join("; ")
    }
}

impl Queues {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new stream.
    pub fn open(&self) -> u64 {
        let mut table = self.table();
        table.next += 1;
        let stream = table.next;
        let thread = thread::current().id();
        table.lines.insert(stream, Line { waiting: VecDeque::new(), queued: 0, thread, open: true });
        stream
    }

    /// No more is queued on it; what is still runs.
    pub fn close(&self, stream: u64) {
        let mut table = self.table();
        let Some(line) = table.lines.get_mut(&stream) else { return };
        line.open = false;
        if line.waiting.is_empty() {
            table.lines.remove(&stream);
        }
    }

    /// Queues an operation.
    pub fn push(&self, stream: u64, operation: Operation) {
        if let Some(line) = self.table().lines.get_mut(&stream) {
            line.waiting.push_back(operation);
            line.queued += 1;
            line.thread = thread::current().id();
        }
    }

    /// Lets a stream wait until another has come to `position`.
    pub fn push_after(&self, stream: u64, other: u64, position: u64) {
        if stream != other && self.table().position(other) < position {
            self.push(stream, Operation::After { stream: other, position });
        }
    }

    /// Operations queued on a stream so far.
    pub fn queued(&self, stream: u64) -> u64 {
        self.table().lines.get(&stream).map_or(0, |line| line.queued)
    }

    /// Runs a stream up to `position`.
    ///
    /// # Errors
    /// It waits for something that is not queued.
    pub fn settle(&self, stream: u64, position: u64) -> Result<()> {
        self.table().settle(stream, position)
    }

    /// Runs all that is queued on a stream.
    ///
    /// # Errors
    /// As for [`settle`](Self::settle).
    pub fn finish(&self, stream: u64) -> Result<()> {
        let mut table = self.table();
        let position = table.lines.get(&stream).map_or(0, |line| line.queued);
        table.settle(stream, position)
    }

    /// Runs all that this host thread has queued.
    ///
    /// # Errors
    /// As for [`settle`](Self::settle).
    pub fn finish_all(&self) -> Result<()> {
        let mut table = self.table();
        for stream in table.own() {
            let position = table.lines.get(&stream).map_or(0, |line| line.queued);
            table.settle(stream, position)?;
        }
        Ok(())
    }

    /// Runs all that can run, of every host thread, and forgets what else uses memory that is about to be freed: first and
    /// one past the last address of each range.
    pub fn forget(&self, ranges: &[(u64, u64)]) {
        if ranges.is_empty() {
            return;
        }
        let mut table = self.table();
        let streams: Vec<u64> = table.lines.keys().copied().collect();
        while streams.iter().any(|&stream| table.step(stream)) {}
        let uses = |at: u64, bytes: usize| {
            ranges.iter().any(|&(low, high)| at < high && low < at.saturating_add(bytes as u64))
        };
        for line in table.lines.values_mut() {
            line.waiting.retain(|operation| match *operation {
                Operation::Copy { to, from, bytes } => !uses(to, bytes) && !uses(from, bytes),
                Operation::Write { word, .. } | Operation::Wait { word, .. } => !uses(word, size_of::<i32>()),
                Operation::After { .. } => true,
            });
        }
    }
}

/// What runs beside a launch on `stream`, if that is one of ours.
pub struct Others<'a> {
    pub queues: &'a Queues,
    pub stream: Option<u64>,
}

impl Others<'_> {
    fn streams(&self, table: &Table) -> Vec<u64> {
        table.own().into_iter().filter(|&other| Some(other) != self.stream).collect()
    }
}

impl Beside for Others<'_> {
    fn is_idle(&self) -> bool {
        self.streams(&self.queues.table()).is_empty()
    }

    fn step(&mut self, draw: usize) -> bool {
        let mut table = self.queues.table();
        let mut streams = self.streams(&table);
        if !streams.is_empty() {
            let first = draw % streams.len();
            streams.rotate_left(first);
        }
        // What other host threads have queued happens where ours comes after it.
        streams.iter().any(|&stream| table.step(stream)) || streams.iter().any(|&stream| table.follow(stream))
    }

    fn waits(&self) -> String {
        self.queues.table().waits()
    }
}
