//! Every op in plain Rust: the CPU device, and the oracle the kernels are tested against.
//!
//! Functions take row-major slices of live rows only (padding never reaches them) and are generic
//! over [`real::Real`]: `f32` is the device, `f64` the precision of the finite-difference tests.
//! Work is split over rayon's threads by output rows or heads, in pieces whose size does not
//! depend on the number of threads, and every sum has one fixed order.

pub mod attention;
pub mod contrastive;
pub mod elementwise;
pub mod gemm;
pub mod loss;
pub mod norm;
pub mod optim;
pub mod patch;
pub mod pool;
pub mod position;
pub mod real;
pub mod residual;
mod scratch;
pub mod simd;
mod softmax;
