//! Position embeddings of the tokens of a batch, and the gradients of their tables.
//!
//! [`Position`] adds the embedding to the embedded tokens in one pass and makes the gradients; it takes every
//! kind that a recipe can name. Where tables are resampled to each image's grid, [`Banks`] hold the filters for
//! every length of an axis, so that the device finds what a token reads from the batch alone: its position, its
//! image's grid and `cu_seqlens`. [`RopeTable`] makes the
//! cosines and sines by which attention turns queries and keys. [`raw`] queues without verifying.

pub mod raw;

mod checked;
mod heuristics;
mod rope;

pub use super::registry::position as instances;

pub use checked::{Backward, Banks, Forward, Places, Position};
pub use heuristics::{Slices, slices};
pub use instances::Mode;
pub use rope::{RopeOperands, RopeTable};
