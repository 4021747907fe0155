//! Structs that begin with their size, so that they may grow.

use bytemuck::Zeroable;

use super::status::{Refusal, Result};

/// A struct of the header.
///
/// # Safety
/// It is `repr(C)`, begins with a `u64` that is its size, and every value of its bytes is one.
pub(super) unsafe trait Sized64: Copy + Zeroable {
    /// Its name in C.
    const NAME: &str;
    /// Its size in the first version of the interface.
    const FIRST: usize;
}

/// Implements [`Sized64`] for a struct.
macro_rules! sized {
    ($type:ty, $name:literal, $first:literal) => {
        const _: () = assert!($first <= size_of::<$type>());
        // SAFETY: numbers and addresses alone, the first of which is the size.
        unsafe impl crate::capi::structs::Sized64 for $type {
            const NAME: &str = $name;
            const FIRST: usize = $first;
        }
    };
}
pub(super) use sized;

/// No struct will ever be so large: what says so was not set.
const MOST: u64 = 1 << 16;

/// The size that a caller gives a struct, which may be that of an older or a newer header.
///
/// # Safety
/// `from` is null or the address of a struct that is as large as it says.
unsafe fn size_of_caller<T: Sized64>(from: *const T) -> Result<usize> {
    let name = T::NAME;
    if from.is_null() || !from.is_aligned() {
        return Err(Refusal::invalid(format!(
            "{from:p} is no address of a {name}; give that of one, aligned as in C"
        )));
    }
    // SAFETY: not null, aligned, and every such struct begins so.
    let size = unsafe { from.cast::<u64>().read() };
    if size < T::FIRST as u64 || size > MOST {
        return Err(Refusal::invalid(format!(
            "the size of a {name} is said to be {size}; set its field size to sizeof({name}), which is {} here",
            size_of::<T>()
        )));
    }
    Ok(size as usize)
}

/// A copy of the caller's struct; fields that it does not have are 0.
///
/// # Safety
/// As for [`size_of_caller`].
pub(super) unsafe fn read<T: Sized64>(from: *const T) -> Result<T> {
    // SAFETY: as the caller promises, here and below.
    let size = unsafe { size_of_caller(from)? };
    let known = size.min(size_of::<T>());
    let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), size) };
    if bytes[known..].iter().any(|&byte| byte != 0) {
        return Err(Refusal::unsupported(format!(
            "the {} has {size} bytes, and sets fields that this library does not know: it knows {known} bytes; use a \
             newer library",
            T::NAME
        )));
    }
    let mut copy = T::zeroed();
    // SAFETY: no more bytes than either struct has, and every value of them is one.
    unsafe { (&raw mut copy).cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), known) };
    Ok(copy)
}

/// Fills the caller's struct, as much of it as there is; its size stays, and what is not known here becomes 0.
///
/// # Safety
/// As for [`size_of_caller`], and it may be written.
pub(super) unsafe fn write<T: Sized64>(to: *mut T, value: &T) -> Result {
    // SAFETY: as the caller promises.
    let size = unsafe { size_of_caller(to)? };
    let known = size.min(size_of::<T>());
    let head = size_of::<u64>();
    let from = std::ptr::from_ref(value).cast::<u8>();
    // SAFETY: the caller's struct has `size` bytes, ours no fewer than `known`, and they are apart.
    unsafe {
        let to = to.cast::<u8>();
        to.add(head).copy_from_nonoverlapping(from.add(head), known - head);
        to.add(known).write_bytes(0, size - known);
    }
    Ok(())
}

/// Writes a result to an address of the caller.
///
/// # Safety
/// `to` is null or an address where a `T` may be written.
pub(super) unsafe fn give<T>(name: &str, to: *mut T, value: T) -> Result {
    if to.is_null() || !to.is_aligned() {
        return Err(Refusal::invalid(format!(
            "{name} is {to:p}; give an address that a result can be written to"
        )));
    }
    // SAFETY: neither null nor misaligned, and as the caller promises.
    unsafe { to.write(value) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::status::Status;
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Zeroable)]
    struct Grown {
        size: u64,
        first: u32,
        second: u32,
        late: u64,
    }
    sized!(Grown, "grown", 16);

    /// What a program has that was compiled with another header.
    fn words(size: u64) -> [u64; 5] {
        [size, 0x2_0000_0001, 3, 0, 0]
    }

    #[test]
    fn structs_of_older_and_newer_headers_are_read() {
        let read = |words: &[u64; 5]| unsafe { read::<Grown>(words.as_ptr().cast()) }; // SAFETY: 40 bytes.
        let older = read(&words(16)).unwrap();
        assert_eq!((older.first, older.second, older.late), (1, 2, 0));
        assert_eq!(read(&words(24)).unwrap().late, 3);
        assert_eq!(read(&words(40)).unwrap().late, 3);
        let mut newer = words(40);
        newer[4] = 1;
        let refusal = read(&newer).err().unwrap();
        assert_eq!(refusal.status, Status::Unsupported);
        assert!(refusal.message.contains("40 bytes"), "{}", refusal.message);
        for size in [0, 15, MOST + 1, u64::MAX] {
            let refusal = read(&words(size)).err().unwrap();
            assert_eq!(refusal.status, Status::InvalidArgument);
            assert!(refusal.message.contains("sizeof(grown), which is 24"), "{}", refusal.message);
        }
        let words = words(24);
        // SAFETY: refused.
        for wrong in [std::ptr::null(), words.as_ptr().cast::<u8>().wrapping_add(4).cast::<Grown>()] {
            assert!(unsafe { super::read(wrong) }.is_err());
        }
    }

    #[test]
    fn structs_of_older_and_newer_headers_are_filled() {
        let value = Grown { size: 0, first: 7, second: 8, late: 9 };
        for (size, expected) in [
            (16, [16, 0x8_0000_0007, 3, 0, 0]),
            (24, [24, 0x8_0000_0007, 9, 0, 0]),
            (40, [40, 0x8_0000_0007, 9, 0, 0]),
        ] {
            let mut words = words(size);
            // SAFETY: 40 bytes.
            unsafe { write(words.as_mut_ptr().cast(), &value) }.unwrap();
            assert_eq!(words, expected);
        }
    }
}
