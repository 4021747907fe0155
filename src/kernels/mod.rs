//! The GPU kernels: one file a family, from the unsafe raw launch to the checked one.

pub mod attention;
pub mod collective;
mod element;
pub mod elementwise;
pub mod gemm;
pub mod loss;
pub mod measure;
pub mod norm;
mod operand;
pub mod optim;
pub mod patch;
pub mod pool;
pub mod position;
pub mod registry;
pub mod residual;

pub use element::Element;
pub use operand::Rows;
pub(crate) use operand::check_cu_seqlens;
