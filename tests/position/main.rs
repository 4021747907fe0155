//! Position embeddings: the CPU device, the kernels against it, and weights for another grid or patch.

mod cpu;
mod kernels;
mod resize;
mod rope;
#[path = "../support/mod.rs"]
mod support;
