//! The backward pass: gradients of q, k, v, and of the gains and biases of QK-norm.
//!
//! Its [`Limits`](super::Limits) are its own, and so is its [`Schedule`](super::Schedule). Statistics of the
//! norm are computed again from the rows, so that the forward pass need not keep them.

mod checked;
mod plan;
pub mod raw;
mod workspace;

pub use checked::Backward;
pub use plan::BackwardPlan;
pub use workspace::{BackwardSizes, LongParts, Workspace};
