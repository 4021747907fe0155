//! A whole recorded step, forward, loss and backward, on every device that has kernels, against the CPU device
//! in f64.

#[path = "../support/mod.rs"]
mod support;

mod case;
mod limits;
mod planned;
mod step;
mod training;
