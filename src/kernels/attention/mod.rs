//! Packed attention with QK-norm and rotary position embedding: every image attends to itself, rows of one image after
//! those of another. Neighbouring heads may share keys and values, as in grouped-query attention.
//!
//! A [`Schedule`] makes the work lists of a batch on the device, once for all layers; an [`Attention`]
//! launches the passes over them. [`raw`] and [`backward::raw`] queue without verifying, for engines with
//! memory of their own. What is short and what it needs of a device is decided by [`ForwardPlan`] and
//! [`BackwardPlan`].

pub mod backward;
pub mod prepare;
pub mod raw;

mod checked;
mod heuristics;
mod lists;
mod windows;

pub use super::registry::attention as instances;

pub use backward::{Backward, BackwardPlan, BackwardSizes};
pub use checked::{Attention, Forward, Statistics};
pub use heuristics::{ForwardPlan, Limits};
pub use instances::Instance;
pub use lists::Schedule;
pub use windows::{WindowSizes, Windows};
