//! Attention: the CPU device, and the kernels against it.

mod backward;
mod case;
mod cpu;
mod f16;
mod forward;
mod gradients;
mod schedule;
#[path = "../support/mod.rs"]
mod support;
mod windows;
