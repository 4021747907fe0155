//! The optimiser: the CPU device, and the kernels against it.

mod adafactor;
mod cpu;
mod goldens;
mod kernels;
mod ranks;
#[path = "../support/mod.rs"]
mod support;
