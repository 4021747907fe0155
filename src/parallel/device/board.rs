//! Where ranks that are threads of one process leave device memory for one another.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use super::super::group::Group;
use crate::device::{Buffer, Event};
use crate::error::{Error, Result};

/// What one rank leaves for another.
pub(super) struct Note {
    /// What it is doing, the same on all ranks.
    pub operation: String,
    /// Memory to be read, which lives at least as long as the note; none where memory has been read.
    pub part: Option<Buffer<u8>>,
    /// When `part` holds what it should, or has been read.
    pub event: Arc<Event>,
}

/// Notes by receiver and sender, in the order in which they were left.
pub(super) struct Board {
    size: usize,
    notes: Vec<Mutex<VecDeque<Note>>>,
}

/// The boards of this process, by number.
static BOARDS: Mutex<Vec<(u64, Weak<Board>)>> = Mutex::new(Vec::new());

/// A number that no other process has, on any machine.
pub(super) fn process() -> u64 {
    static NUMBER: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()));
    *NUMBER
}

impl Board {
    /// One board for all ranks of `host`, which are threads of this process.
    ///
    /// # Errors
    /// Those of [`Group::receive`].
    pub(super) fn share(host: &Group) -> Result<Arc<Self>> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let boards = || BOARDS.lock().unwrap_or_else(PoisonError::into_inner);
        let mut number = [0];
        let mut board = None;
        if host.rank() == 0 {
            let slots = host.size() * host.size();
            let new =
                Arc::new(Self { size: host.size(), notes: (0..slots).map(|_| Mutex::default()).collect() });
            number = [NEXT.fetch_add(1, Ordering::Relaxed)];
            let mut boards = boards();
            boards.retain(|(_, board)| board.strong_count() > 0);
            boards.push((number[0], Arc::downgrade(&new)));
            board = Some(new);
        }
        host.broadcast(&mut number, 0)?;
        let known =
            || boards().iter().find(|(of, _)| *of == number[0]).and_then(|(_, board)| board.upgrade());
        let board = board.or_else(known);
        // Rank 0 keeps it until all have it.
        host.barrier()?;
        board.ok_or_else(|| Error::failure("the ranks are not threads of one process"))
    }

    fn notes(&self, to: usize, from: usize) -> &Mutex<VecDeque<Note>> {
        &self.notes[to * self.size + from]
    }

    /// Leaves a note; a message tells `to` of it.
    pub(super) fn leave(&self, to: usize, from: usize, note: Note) {
        self.notes(to, from).lock().unwrap_or_else(PoisonError::into_inner).push_back(note);
    }

    /// The next note of `from`, of which a message has told.
    pub(super) fn take(&self, to: usize, from: usize) -> Result<Note> {
        let note = self.notes(to, from).lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        note.ok_or_else(|| Error::failure(format!("rank {from} has told of device memory and shown none")))
    }
}
