//! Lends the kernels and whole training steps to another engine in the same process. The kernels are the functions of
//! C (`include/trencadis.h`), which this library exports as the one of `tools/c-library` does; [`steps`] trains a recipe
//! in the engine's context, with memory and streams of its own. `tools/compare_torch.py --gpu` loads it beside PyTorch.
//!
//! Functions of [`steps`] return 0 or a size, and −1 where [`trencadis_error`] tells why not.

mod steps;
#[allow(dead_code)]
#[path = "../../benches/common/step/training.rs"]
mod training;

pub use trencadis::capi::*;

use std::cell::RefCell;
use std::ffi::c_char;

use trencadis::Result;

thread_local! {
    static MESSAGE: RefCell<String> = const { RefCell::new(String::new()) };
}

fn code(outcome: Result<i64>) -> i64 {
    outcome.unwrap_or_else(|error| {
        MESSAGE.with_borrow_mut(|message| *message = error.to_string());
        -1
    })
}

/// What was made, to be given back later; null where it was not.
fn handle<T>(made: Result<T>) -> *mut T {
    made.map(|made| Box::into_raw(Box::new(made))).unwrap_or_else(|error| {
        code(Err(error));
        std::ptr::null_mut()
    })
}

/// Copies `from`, cut to `capacity` bytes, and returns how many these are.
///
/// # Safety
/// `to` has room for `capacity` bytes.
unsafe fn copy(from: &str, to: *mut c_char, capacity: u64) -> i64 {
    let bytes = &from.as_bytes()[..from.len().min(capacity as usize)];
    // SAFETY: as the caller promises.
    unsafe { to.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    bytes.len() as i64
}

/// Copies why the last function on this thread failed, cut to `capacity` bytes, and returns its length.
///
/// # Safety
/// `text` has room for `capacity` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_error(text: *mut c_char, capacity: u64) -> i64 {
    // SAFETY: as the caller promises.
    MESSAGE.with_borrow(|message| unsafe { copy(message, text, capacity) })
}

/// Bytes of [`steps::TrainingRun`], for callers to hold theirs against.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_training_run_bytes() -> i64 {
    size_of::<steps::TrainingRun>() as i64
}
