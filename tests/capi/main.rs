//! The functions of C, called as C calls them, over kernels on the emulator: results against the CPU device, and what
//! is refused.

mod attention;
mod faults;
mod memory;
mod rows;
#[path = "../support/mod.rs"]
mod support;
