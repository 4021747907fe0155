//! Position embeddings: the CPU device, and the kernels against it.

mod cpu;
mod kernels;
mod rope;
#[path = "../support/mod.rs"]
mod support;
