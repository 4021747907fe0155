//! The residual connection with LayerScale and stochastic depth, where no product's epilogue and no norm takes
//! it, and the factors of stochastic depth.

mod checked;
mod keep;
mod raw;

pub use checked::{Branch, BranchGrad, Packed, Residual};
pub use keep::{DropPath, DropPathKeys, DropPathRate, KeepParams, launch_keep};
pub use raw::{
    BackwardParams, ForwardParams, SLICE_ROWS, backward_workspace_bytes, launch_backward, launch_forward,
};

pub use super::registry::residual as instances;
