//! Raw handles: what a raw launch takes, so that any engine can call it on its own stream and memory.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

/// Address of elements of type `T` in device memory. It owns nothing and checks nothing.
#[repr(transparent)]
pub struct Ptr<T> {
    address: u64,
    element: PhantomData<*const T>,
}

// SAFETY: an address is a number; whoever gives it to a kernel answers for what lies there.
unsafe impl<T> Send for Ptr<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Ptr<T> {}

// Written out because a derive would ask the same of `T`.
impl<T> Clone for Ptr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ptr<T> {}

impl<T> PartialEq for Ptr<T> {
    fn eq(&self, other: &Self) -> bool {
        self.address == other.address
    }
}

impl<T> Eq for Ptr<T> {}

impl<T> fmt::Debug for Ptr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.address)
    }
}

impl<T> Ptr<T> {
    /// The address 0: an operand that is not there.
    pub const fn null() -> Self {
        Self::from_raw(0)
    }

    /// The address as the driver gives it (`CUdeviceptr`).
    pub const fn from_raw(address: u64) -> Self {
        Self { address, element: PhantomData }
    }

    /// The address as a number.
    pub const fn address(self) -> u64 {
        self.address
    }

    /// Whether it is [`null`](Self::null).
    pub const fn is_null(self) -> bool {
        self.address == 0
    }

    /// The address `elements` further on.
    pub const fn offset(self, elements: usize) -> Self {
        Self::from_raw(self.address + (elements * size_of::<T>()) as u64)
    }

    /// The same address, of elements of another type.
    pub const fn cast<U>(self) -> Ptr<U> {
        Ptr::from_raw(self.address)
    }
}

/// A stream: a `CUstream`, or a stream of the emulator. Null is the default stream.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct RawStream(pub *mut c_void);

// SAFETY: the driver's streams may be used from any thread, and so may the emulator's.
unsafe impl Send for RawStream {}
// SAFETY: as above.
unsafe impl Sync for RawStream {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_move_by_elements() {
        let p = Ptr::<u16>::from_raw(0x1000);
        assert_eq!(p.offset(3).address(), 0x1006);
        assert_eq!(p.cast::<u64>().offset(1), Ptr::from_raw(0x1008));
        assert_eq!(format!("{p:?}"), "0x1000");
        assert!(Ptr::<f32>::null().is_null() && !p.is_null());
        assert_eq!(size_of::<Ptr<f32>>(), 8);
    }
}
