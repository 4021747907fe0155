//! The kernels as functions of C. `include/trencadis.h` is made from this module (`tests/capi_header.rs`), and
//! `docs/c-api.md` tells how to use it; what is said here to callers stands in the header.
//!
//! Every function passes its arguments on to the checked launch of [`kernels`](crate::kernels), so what that refuses
//! is a status and a sentence here. None unwinds: what panics is a status too.

mod attention;
mod attention_call;
mod gemm;
mod handle;
mod norm;
mod operands;
mod pool;
mod status;
mod structs;
mod windows;

pub use attention::*;
pub use gemm::*;
pub use handle::*;
pub use norm::*;
pub use pool::*;
pub use status::{Status, trencadis_last_error};
pub use windows::*;

use std::ffi::c_char;

/// Version of this interface. Within one version nothing that works stops working: functions, numbers and fields keep
/// their meaning, structs grow at their end alone, and a new field that is 0 means what was there before. A program
/// that was compiled with an older header of the same version runs with a newer library as it is.
pub const TRENCADIS_ABI_VERSION: u32 = 1;

/// Elements of activations: `dtype` of an operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16.
    Bf16 = 0,
    /// IEEE 754 binary16. Of attention alone.
    F16 = 1,
    /// IEEE 754 binary32. Of the query of attention pooling alone.
    F32 = 2,
}

/// Normalisation of queries and keys over the columns of a head: `norm` of an operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None; gains and biases are ignored.
    None = 0,
    /// Root mean square.
    Rms = 1,
    /// LayerNorm.
    LayerNorm = 2,
}

/// The interface that the library has: compare it with `TRENCADIS_ABI_VERSION` of the header.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_abi_version() -> u32 {
    TRENCADIS_ABI_VERSION
}

/// Version of the library, such as "0.1.0"; never freed.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
