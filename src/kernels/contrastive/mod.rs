//! Losses of pairs of images and texts with their gradients, without ever holding the matrix of scores.
//!
//! | op of the graph | launches |
//! |---|---|
//! | softmax, sigmoid contrastive loss | lengths of the vectors; statistics of rows and columns; losses; gradient, from scores that are made again; projection off each vector, with scale, bias and ranks |

mod checked;
mod raw;
mod workspace;

pub use super::registry::contrastive as instances;
pub use checked::{Contrastive, Operands};
pub use raw::{ContrastiveParams, launch};
pub use workspace::{MAX_SPLITS, MAX_WIDTH, Workspace};
