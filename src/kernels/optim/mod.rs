//! The optimiser over flat arenas: gradient norm and clipping, AdamW, LAMB, SGD and Adafactor with bf16 copy and moving
//! average in the same pass, zero gradients, bf16 copies.
//!
//! What changes from step to step lies in device memory: the host writes an [`OptimizerStep`], the kernels keep
//! an [`OptimizerState`]. A step is [`Operands::adamw`], [`Operands::lamb`], [`Operands::sgd`] or
//! [`Operands::adafactor`]; all take the gradient norm first and change nothing where it is not finite. Products that
//! write gradients may leave their squares, in which a gradient from 1.8e19 on counts as not finite; then the norm reads
//! [the rest](Squared) alone. Where several ranks have a part of the arena each, the norm is taken in two halves: [`Operands::squares`] of every rank, then [`Operands::adamw_of`] or [`Operands::sgd_of`] over the squares
//! of all; or [`Operands::lamb_squares`], and [`Operands::lamb_of`] over what that leaves on all; or
//! [`Operands::adafactor_sums`], whose sums are added up, and [`Operands::adafactor_of`].

mod adafactor;
mod arena;
mod checked;
mod raw;
mod squared;
mod step;

pub use super::registry::optim as instances;
pub use adafactor::{
    AdafactorBlocks, AdafactorParams, FactoredEntry, Lines, StatisticTables, Statistics, WholeEntry,
    WholeSpec, launch_adafactor_of, launch_adafactor_sums,
};
pub use arena::{ALIGNMENT, Arena, CHUNK, ChunkEntry, SliceSpec, Tables, TensorEntry, TensorSpec};
pub use checked::{Moments, Operands, add, cast, workspace_bytes, zero};
pub use raw::{
    AddParams, CastParams, NormParams, RestParams, UpdateParams, ZeroParams, launch_adamw, launch_add,
    launch_cast, launch_finish, launch_lamb, launch_lamb_rates, launch_lamb_squares, launch_norm,
    launch_rest_squares, launch_sgd, launch_squares, launch_zero, norm_blocks,
};
pub use squared::Squared;
pub use step::{Factors, OptimizerState, OptimizerStep};
