//! Named weights: in and out of files, and fitted to a model's parameters.

pub mod foreign;
pub mod match_params;
pub mod npz;
mod recognise;
pub mod resize;
pub mod safetensors;
pub mod sharded;

pub use match_params::{AssignReport, Policy, assign, check_fit};
pub use npz::NpzFile;
pub use safetensors::Weights;
pub use sharded::Tensors;
