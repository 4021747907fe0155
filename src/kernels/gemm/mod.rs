//! Matrix products: bf16 operands, f32 sums, and what is done to a result while it is still in registers.
//!
//! [`Gemm`] describes a product and [`Epilogue`] what becomes of it; [`Gemm::plan`] chooses tile and slices,
//! [`Epilogue::workspace_bytes`] tells what memory they need, [`Gemm::launch`] verifies and queues. [`raw`]
//! queues without verifying.
//!
//! | in a linear layer | layout | epilogue |
//! |---|---|---|
//! | `y = x wᵀ + b`, with GELU or residual | [`Layout::Nt`] | [`Store`] |
//! | `dx = dy w` | [`Layout::Nn`] | [`Store`] |
//! | `dh = (dy w) · gelu'(h)`, `db` | [`Layout::Nn`] | [`GeluGrad`] |
//! | `dw += dyᵀ x` | [`Layout::Tn`] | [`Sum`] |
//! | `db += Σ dy` | | [`BiasGrad`] |

pub mod raw;

mod bias_grad;
mod checked;
mod heuristics;
mod memory;

pub use super::registry::gemm as tiles;

pub use bias_grad::BiasGrad;
pub use checked::{Epilogue, GeluGrad, Gemm, Store, Sum};
pub use heuristics::{Plan, Shape, plan};
pub use memory::{Matrix, Vector};
pub use tiles::{Kind, Layout, TILES, Tile};
