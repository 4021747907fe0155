//! The kernels that the build compiled for the emulator, by name.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::LazyLock;

use super::machine;

include!(concat!(env!("OUT_DIR"), "/emulator.rs"));

/// A kernel that can be run.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Runs one thread of it; takes the constant arguments.
    pub run: unsafe extern "C" fn(*const c_void),
    /// Bytes of the constant arguments.
    pub params_bytes: usize,
    /// Threads of a block, exactly.
    pub threads: u32,
    /// Registers of a thread, at most.
    pub registers: u32,
}

static KERNELS: LazyLock<HashMap<&'static str, Entry>> = LazyLock::new(|| {
    let entry = |kernel: &machine::Kernel| {
        // SAFETY: the build writes names as C string literals, which live for ever.
        let name = unsafe { CStr::from_ptr(kernel.name) };
        let machine::Kernel { run, params_bytes, threads, registers, .. } = *kernel;
        let entry = Entry { run, params_bytes, threads, registers };
        name.to_str().ok().map(|name| (name, entry))
    };
    tables().into_iter().flatten().filter_map(entry).collect()
});

/// The kernel named `name`.
pub fn find(name: &str) -> Option<Entry> {
    KERNELS.get(name).copied()
}
