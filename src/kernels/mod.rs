//! The GPU kernels: one file a family, from the unsafe raw launch to the checked one.

pub mod attention;
pub mod elementwise;
pub mod gemm;
pub mod measure;
mod operand;
pub mod patch;
pub mod pool;
pub mod position;
pub mod registry;

pub use operand::Rows;
