//! Open kernels and memory of the host, as a program of C has them.

use std::ffi::CStr;

use bytemuck::Pod;
use half::{bf16, f16};
use trencadis::capi::{
    Dtype, Handle, Status, trencadis_close, trencadis_last_error, trencadis_open_emulator,
};

use crate::support::numbers::distance;

/// Kernels on an emulated GPU of this compute capability, closed at the end.
pub struct Open(pub *mut Handle);

// SAFETY: handles may be used from any thread.
unsafe impl Sync for Open {}

impl Open {
    pub fn new(capability: u32) -> Self {
        let mut kernels = std::ptr::null_mut();
        // SAFETY: writes the handle.
        done(unsafe { trencadis_open_emulator(capability, &raw mut kernels) });
        assert!(!kernels.is_null());
        Self(kernels)
    }

    pub fn handle(&self) -> *mut Handle {
        self.0
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        assert_eq!(trencadis_close(self.0), Status::Ok);
    }
}

/// Why the last function failed.
pub fn message() -> String {
    let mut text = [1; 2000];
    // SAFETY: as large as is said.
    let length = unsafe { trencadis_last_error(text.as_mut_ptr(), text.len()) };
    // SAFETY: there is a 0 behind the text.
    let text = unsafe { CStr::from_ptr(text.as_ptr()) }.to_str().unwrap();
    assert_eq!(text.len(), length);
    text.into()
}

/// Fails where the status is not 0.
#[track_caller]
pub fn done(status: Status) {
    assert_eq!(status, Status::Ok, "{}", message());
}

/// Fails where a function did not refuse with this status and a sentence that has `part`.
#[track_caller]
pub fn refused(found: Status, status: Status, part: &str) {
    let message = message();
    assert!(found == status && message.contains(part), "{found:?}, `{part}` is not in: {message}");
}

/// Memory of the host, aligned as that of a device is.
pub struct Memory<T> {
    words: Vec<u128>,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Pod> Memory<T> {
    pub fn zeros(len: usize) -> Self {
        let words = vec![0; (len * size_of::<T>()).div_ceil(16).max(1)];
        Self { words, len, element: std::marker::PhantomData }
    }

    pub fn of(values: &[T]) -> Self {
        let mut memory = Self::zeros(values.len());
        memory.slice_mut().copy_from_slice(values);
        memory
    }

    pub fn slice(&self) -> &[T] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    fn slice_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }

    /// The address of element `at`, to read or to write.
    pub fn at(&self, at: usize) -> *mut T {
        self.words.as_ptr().cast::<T>().cast_mut().wrapping_add(at)
    }

    /// The address.
    pub fn ptr<U>(&self) -> *mut U {
        self.at(0).cast()
    }
}

/// Elements of activations.
pub trait Half: Pod + Into<f64> {
    const DTYPE: Dtype;
    fn round(x: f64) -> Self;
}

impl Half for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    fn round(x: f64) -> Self {
        Self::from_f64(x)
    }
}

impl Half for f16 {
    const DTYPE: Dtype = Dtype::F16;
    fn round(x: f64) -> Self {
        Self::from_f64(x)
    }
}

impl<E: Half> Memory<E> {
    pub fn rounded(values: &[f64]) -> Self {
        Self::of(&values.iter().map(|&x| E::round(x)).collect::<Vec<_>>())
    }
}

/// Fails where two vectors are further apart than `metric`, or any two numbers than `largest` of the largest.
#[track_caller]
pub fn alike(name: &str, got: &[f64], want: &[f64], metric: f64, largest: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    let scale = want.iter().fold(1e-30f64, |most, x| most.max(x.abs()));
    let worst = got.iter().zip(want).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max) / scale;
    let apart = distance(got, want);
    assert!(
        apart <= metric && worst <= largest,
        "{name}: distance {apart:.2e}, largest difference {worst:.2e}"
    );
}

/// In f64.
pub fn wide<T: Copy + Into<f64>>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&x| x.into()).collect()
}
