//! The optimiser: the CPU device, and the kernels against it.

mod adafactor;
mod cpu;
mod goldens;
mod kernels;
mod ranks;
mod squared;
#[path = "../support/mod.rs"]
mod support;
