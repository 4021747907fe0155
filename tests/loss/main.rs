//! Losses: the CPU device, and the kernels against it.

mod cpu;
mod kernels;
#[path = "../support/mod.rs"]
mod support;
