//! What functions return, and why.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::c_char;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::Error;

/// What a function returns: 0, or why it did nothing. `trencadis_last_error` has the sentence.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done, or queued.
    Ok = 0,
    /// An argument is not as its documentation says.
    InvalidArgument = 1,
    /// What was asked for makes sense, but neither this library nor this device has a kernel for it.
    Unsupported = 2,
    /// No driver, no GPU, no current context, or no kernels for it.
    NoDevice = 3,
    /// The device refuses a launch, or has failed.
    DeviceFailure = 4,
    /// A mistake in the library; nothing is known about what was written.
    Panic = 5,
}

/// A status that is not 0, with its sentence.
#[derive(Debug)]
pub(super) struct Refusal {
    pub status: Status,
    pub message: String,
}

pub(super) type Result<T = (), E = Refusal> = std::result::Result<T, E>;

impl Refusal {
    pub fn invalid(message: impl Display) -> Self {
        Self { status: Status::InvalidArgument, message: message.to_string() }
    }

    pub fn unsupported(message: impl Display) -> Self {
        Self { status: Status::Unsupported, message: message.to_string() }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::Usage(_) => Status::InvalidArgument,
            Error::Failure(_) => Status::DeviceFailure,
        };
        Self { status, message: error.to_string() }
    }
}

thread_local! {
    static MESSAGE: RefCell<String> = const { RefCell::new(String::new()) };
}

fn remember(message: String) {
    // A thread that is ending may have none any more.
    let _ = MESSAGE.try_with(|last| last.replace(message));
}

/// Runs the whole of a function, which cannot unwind.
pub(super) fn guard(work: impl FnOnce() -> Result) -> Status {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => Status::Ok,
        Ok(Err(Refusal { status, message })) => {
            remember(message);
            status
        }
        Err(payload) => {
            remember(format!("the library has panicked, which is a mistake in it: {}", text(&*payload)));
            Status::Panic
        }
    }
}

fn text(payload: &(dyn Any + Send)) -> &str {
    let owned = || payload.downcast_ref::<String>().map(String::as_str);
    payload.downcast_ref::<&str>().copied().or_else(owned).unwrap_or("no message")
}

/// Bytes of the longest beginning of `text` that is whole characters and at most `most` bytes.
pub(super) fn cut(text: &str, most: usize) -> usize {
    (0..=most.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

/// Copies why the last function on this thread failed that did, as UTF-8, and returns its length in bytes without the
/// 0 behind it. `text` has room for `capacity` bytes; what does not fit with a 0 behind it is left out. Null asks for
/// the length alone.
///
/// # Safety
/// `text` is null or has room for `capacity` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_last_error(text: *mut c_char, capacity: usize) -> usize {
    let mut length = 0;
    guard(|| {
        let message = MESSAGE.try_with(|last| last.borrow().clone()).unwrap_or_default();
        length = message.len();
        if !text.is_null() && capacity > 0 {
            let cut = cut(&message, capacity - 1);
            // SAFETY: `cut` is less than the capacity that the caller promises.
            unsafe {
                text.cast::<u8>().copy_from_nonoverlapping(message.as_ptr(), cut);
                text.add(cut).write(0);
            }
        }
        Ok(())
    });
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(capacity: usize) -> (usize, Vec<u8>) {
        let mut room = vec![0xff; capacity];
        // SAFETY: as large as is said.
        let length = unsafe { trencadis_last_error(room.as_mut_ptr().cast(), capacity) };
        (length, room)
    }

    #[test]
    fn a_panic_is_a_status() {
        let owned = String::from("five images");
        assert_eq!(guard(|| panic!("lost {owned}")), Status::Panic);
        let (length, text) = last(200);
        let text = str::from_utf8(&text[..length]).unwrap();
        assert_eq!(text, "the library has panicked, which is a mistake in it: lost five images");
        assert_eq!(guard(|| panic!("plain")), Status::Panic);
        assert_eq!(guard(|| std::panic::panic_any(7)), Status::Panic);
        assert!(String::from_utf8_lossy(&last(200).1).contains("no message"));
    }

    #[test]
    fn messages_are_cut_between_characters() {
        let refused = guard(|| Err(Refusal::unsupported("γ is 2")));
        assert_eq!(refused, Status::Unsupported);
        // Success leaves the last message as it is.
        assert_eq!(guard(|| Ok(())), Status::Ok);
        assert_eq!(last(8), (7, b"\xce\xb3 is 2\0".to_vec()));
        assert_eq!(last(7), (7, b"\xce\xb3 is \0\0".to_vec().into_iter().take(6).chain([0]).collect()));
        assert_eq!(last(2), (7, vec![0, 0xff]));
        assert_eq!(last(1), (7, vec![0]));
        assert_eq!(last(0), (7, vec![]));
        // SAFETY: null is told apart.
        assert_eq!(unsafe { trencadis_last_error(std::ptr::null_mut(), 100) }, 7);
    }

    #[test]
    fn threads_have_messages_of_their_own() {
        guard(|| Err(Refusal::invalid("here")));
        std::thread::spawn(|| assert_eq!(last(5), (0, vec![0, 0xff, 0xff, 0xff, 0xff]))).join().unwrap();
        assert_eq!(last(5), (4, b"here\0".to_vec()));
    }
}
