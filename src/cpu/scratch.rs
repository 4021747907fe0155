//! Work space that a thread keeps from call to call.

use std::any::Any;
use std::cell::RefCell;

thread_local! {
    /// A stack with one `Vec<T>` of each type for every level of nesting.
    static SCRATCH: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with buffers of the given lengths, whose contents are arbitrary. Calls may nest:
/// a buffer leaves the thread's stack while `f` runs.
pub(crate) fn with_scratch<T: Copy + Default + 'static, U, const N: usize>(
    lengths: [usize; N],
    f: impl FnOnce([&mut [T]; N]) -> U,
) -> U {
    /// Keeps the buffers on separate cache lines in both precisions.
    const ALIGN: usize = 16;
    let kept = SCRATCH.with_borrow_mut(|stack| {
        let at = stack.iter().rposition(|kept| kept.is::<Vec<T>>())?;
        stack.remove(at).downcast::<Vec<T>>().ok()
    });
    let mut buffer = kept.unwrap_or_default();
    let total = lengths.iter().map(|n| n.next_multiple_of(ALIGN)).sum();
    if buffer.len() < total {
        // Buffers may be large, and are not to be twice as large as needed.
        buffer.reserve_exact(total - buffer.len());
        buffer.resize(total, T::default());
    }
    let mut rest = buffer.as_mut_slice();
    let result = f(lengths.map(|n| {
        let (part, tail) = std::mem::take(&mut rest).split_at_mut(n.next_multiple_of(ALIGN));
        rest = tail;
        &mut part[..n]
    }));
    SCRATCH.with_borrow_mut(|stack| stack.push(buffer));
    result
}
