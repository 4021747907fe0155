//! Sums of whole tensors: the kernels against the CPU device.

mod kernels;
#[path = "../support/mod.rs"]
mod support;
