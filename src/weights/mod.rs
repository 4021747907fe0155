//! Named weights: in and out of files, and fitted to a model's parameters.

pub mod foreign;
pub mod match_params;
pub mod safetensors;

pub use match_params::{AssignReport, Policy, assign};
pub use safetensors::Weights;
