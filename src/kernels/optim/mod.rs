//! The optimiser over flat arenas: gradient norm and clipping, AdamW and LAMB with bf16 copy and moving average
//! in the same pass, zero gradients, bf16 copies.
//!
//! What changes from step to step lies in device memory: the host writes an [`OptimizerStep`], the kernels keep
//! an [`OptimizerState`]. A step is [`Operands::adamw`] or [`Operands::lamb`]; both take the gradient norm first
//! and change nothing where it is not finite.

mod arena;
mod checked;
mod raw;
mod step;

pub use super::registry::optim as instances;
pub use arena::{ALIGNMENT, Arena, CHUNK, ChunkEntry, Tables, TensorEntry, TensorSpec};
pub use checked::{Operands, cast, workspace_bytes, zero};
pub use raw::{
    CastParams, NormParams, UpdateParams, ZeroParams, launch_adamw, launch_cast, launch_lamb, launch_norm,
    launch_zero, norm_blocks,
};
pub use step::{Factors, OptimizerState, OptimizerStep};
