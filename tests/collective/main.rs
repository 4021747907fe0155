//! Sums of the vectors of several ranks: the kernel against the CPU.

mod kernels;
#[path = "../support/mod.rs"]
mod support;
