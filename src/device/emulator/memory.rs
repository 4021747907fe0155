//! Global memory: allocations on the host, far enough from one another that a small overrun meets none.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::machine::FreedRange;

/// Alignment of an allocation, that of cudaMalloc.
const ALIGN: usize = 256;
/// Bytes on either side of an allocation that belong to nobody.
const RED_ZONE: usize = 256;
/// Freed memory is kept, to tell its use from a wild address, up to so many bytes.
const KEPT_BYTES: usize = 64 << 20;

/// One allocation; the memory lives as long as a launch may use it.
pub struct Allocation {
    base: *mut u8,
    layout: Layout,
    len: usize,
}

// SAFETY: the memory is owned, and only reached through addresses, as that of a device is.
unsafe impl Send for Allocation {}
// SAFETY: see above.
unsafe impl Sync for Allocation {}

impl Allocation {
    fn new(len: usize) -> Self {
        let bytes = len.next_multiple_of(ALIGN) + 2 * RED_ZONE;
        let layout = Layout::from_size_align(bytes, ALIGN).unwrap_or(Layout::new::<[u8; ALIGN]>());
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc(layout) };
        if base.is_null() || layout.size() < bytes {
            handle_alloc_error(layout);
        }
        // SAFETY: `bytes` bytes were allocated. All ones is NaN in every float format.
        unsafe { base.write_bytes(0xff, bytes) };
        Self { base, layout, len }
    }

    /// First and one past the last address.
    pub fn range(&self) -> (u64, u64) {
        let low = self.base as u64 + RED_ZONE as u64;
        (low, low + self.len as u64)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.base, self.layout) };
    }
}

/// The memory at the start of a launch, and what was freed not long before.
#[derive(Clone)]
pub struct Snapshot {
    /// First and one past the last address of what may be used: apart, in order.
    pub live: Arc<[(u64, u64)]>,
    pub freed: Arc<[FreedRange]>,
    /// Keeps what is used there, and what was freed from being given out again.
    _kept: Arc<[Arc<Allocation>]>,
}

/// Ranges in order, those that overlap as one. Neighbours stay two, so that running over the end of one is seen.
fn apart(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let overlap = next.0 < last.1;
        if overlap {
            last.1 = last.1.max(next.1);
        }
        overlap
    });
    ranges
}

/// The parts of `range` that are in none of `others`.
fn uncovered(range: (u64, u64), others: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    others.fold(vec![range], |left, (low, high)| {
        let around = left.into_iter().flat_map(|(from, to)| [(from, to.min(low)), (from.max(high), to)]);
        around.filter(|(from, to)| from < to).collect()
    })
}

#[derive(Default)]
struct Tables {
    live: BTreeMap<u64, Arc<Allocation>>,
    /// What others own: first and one past the last address, one entry for each time it is lent.
    lent: Vec<(u64, u64)>,
    freed: VecDeque<Arc<Allocation>>,
    freed_bytes: usize,
    snapshot: Option<Snapshot>,
}

/// Global memory of an emulator.
#[derive(Default)]
pub struct Memory(Mutex<Tables>);

impl Memory {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Address of `len` bytes of NaN.
    pub fn alloc(&self, len: usize) -> u64 {
        let allocation = Arc::new(Allocation::new(len));
        let address = allocation.range().0;
        let mut tables = self.tables();
        tables.live.insert(address, allocation);
        tables.snapshot = None;
        address
    }

    /// Lets launches use memory that somebody else owns.
    pub fn lend(&self, address: u64, len: usize) {
        let mut tables = self.tables();
        tables.lent.push((address, address + len as u64));
        tables.snapshot = None;
    }

    /// Undoes one [`lend`](Self::lend) of the same range. Gives the parts of it that nothing else covers: first and one
    /// past the last address of each.
    pub fn give_back(&self, address: u64, len: usize) -> Vec<(u64, u64)> {
        let mut tables = self.tables();
        let range = (address, address + len as u64);
        let Some(at) = tables.lent.iter().position(|&lent| lent == range) else {
            return Vec::new();
        };
        tables.lent.swap_remove(at);
        tables.snapshot = None;
        let others = tables.live.values().map(|own| own.range()).chain(tables.lent.iter().copied());
        uncovered(range, others)
    }

    /// Bytes of the allocation at `address`; 0 where there is none.
    pub fn bytes_at(&self, address: u64) -> usize {
        self.tables().live.get(&address).map_or(0, |allocation| allocation.len)
    }

    /// Frees the allocation at `address`; false if there is none.
    pub fn free(&self, address: u64) -> bool {
        let mut tables = self.tables();
        let Some(allocation) = tables.live.remove(&address) else {
            return false;
        };
        tables.snapshot = None;
        tables.freed_bytes += allocation.len;
        tables.freed.push_back(allocation);
        while tables.freed_bytes > KEPT_BYTES || tables.freed.len() > 1024 {
            let Some(oldest) = tables.freed.pop_front() else { break };
            tables.freed_bytes -= oldest.len;
        }
        true
    }

    /// What there is now.
    pub fn snapshot(&self) -> Snapshot {
        let mut tables = self.tables();
        if let Some(snapshot) = &tables.snapshot {
            return snapshot.clone();
        }
        let freed_range = |allocation: &Arc<Allocation>| {
            let (low, high) = allocation.range();
            FreedRange { low, high }
        };
        let snapshot = Snapshot {
            live: apart(
                tables.live.values().map(|own| own.range()).chain(tables.lent.iter().copied()).collect(),
            )
            .into(),
            freed: tables.freed.iter().map(freed_range).collect(),
            _kept: tables.live.values().chain(&tables.freed).cloned().collect(),
        };
        tables.snapshot = Some(snapshot.clone());
        snapshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_is_one_range_and_neighbours_are_two() {
        assert_eq!(apart(vec![(30, 40), (0, 10), (10, 20), (35, 36)]), [(0, 10), (10, 20), (30, 40)]);
        assert_eq!(apart(vec![(5, 9), (0, 6), (8, 12), (0, 6)]), [(0, 12)]);
    }

    #[test]
    fn what_nothing_else_covers() {
        let left = |others: &[(u64, u64)]| uncovered((10, 20), others.iter().copied());
        assert_eq!(left(&[]), [(10, 20)]);
        assert_eq!(left(&[(0, 10), (20, 30)]), [(10, 20)]);
        assert_eq!(left(&[(12, 14), (18, 25), (13, 15)]), [(10, 12), (15, 18)]);
        assert_eq!(left(&[(5, 15), (15, 20)]), []);
    }

    #[test]
    fn what_is_lent_twice_is_given_back_twice() {
        let memory = Memory::default();
        let live = || memory.snapshot().live.to_vec();
        memory.lend(64, 16);
        memory.lend(64, 16);
        memory.lend(64, 8);
        assert_eq!(memory.give_back(64, 16), []);
        assert_eq!(live(), [(64, 80)]);
        assert_eq!(memory.give_back(64, 16), [(72, 80)]);
        assert_eq!(live(), [(64, 72)]);
        assert_eq!(memory.give_back(64, 8), [(64, 72)]);
        assert_eq!(live(), []);
        assert_eq!(memory.give_back(64, 8), [], "it is not lent any more");
    }
}
