//! The optimiser: the CPU device, and the kernels against it.

mod cpu;
mod kernels;
mod ranks;
#[path = "../support/mod.rs"]
mod support;
