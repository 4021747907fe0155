//! Contrastive losses: the CPU device, and the kernels against it.

mod cpu;
mod device;
mod gradients;
mod kernels;
#[path = "../support/mod.rs"]
mod support;
