//! Lends the kernels to another engine in the same process: a library with a few C functions that take that
//! engine's addresses and stream. `tools/compare_torch.py --gpu` loads it beside PyTorch.
//!
//! An engine makes its CUDA context current, opens the kernels once, and queues launches: [`gemm`] and
//! [`attention`] allocate, copy and wait for nothing. [`steps`] trains a recipe in that context, with memory and
//! streams of its own. Functions return 0 or a size, and −1 where [`trencadis_error`] tells why not.

mod attention;
mod gemm;
mod steps;
#[allow(dead_code)]
#[path = "../../benches/common/step/training.rs"]
mod training;

use std::cell::RefCell;
use std::ffi::c_char;

use trencadis::Result;
use trencadis::device::Kernels;

use attention::{AttentionCall, AttentionSizes};
use gemm::GemmCall;
use steps::TrainingRun;

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

/// Bytes of the structs, for callers to hold theirs against: which 0 GemmCall, 1 AttentionCall,
/// 2 AttentionSizes, 3 TrainingRun.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_struct_bytes(which: i32) -> i64 {
    match which {
        0 => size_of::<GemmCall>() as i64,
        1 => size_of::<AttentionCall>() as i64,
        2 => size_of::<AttentionSizes>() as i64,
        3 => size_of::<TrainingRun>() as i64,
        _ => -1,
    }
}

/// The kernels for the CUDA context that is current on this thread; null where there is none.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_open() -> *mut Kernels {
    handle(Kernels::for_current_context())
}

/// Gives the kernels back, before the context is destroyed.
///
/// # Safety
/// `kernels` is of [`trencadis_open`] and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_close(kernels: *mut Kernels) {
    if !kernels.is_null() {
        // SAFETY: as the caller promises.
        drop(unsafe { Box::from_raw(kernels) });
    }
}
