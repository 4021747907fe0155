//! Linear layers: the CPU device, and the GEMM kernels against it.

mod cpu;
mod errors;
mod gradients;
mod hopper;
mod product;
mod sharded;
mod store;
#[path = "../support/mod.rs"]
mod support;
