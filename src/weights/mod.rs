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

use crate::hash::Fnv1a;

/// Elements at the beginning of a tensor that [`fingerprint`] looks at.
pub const LOOKED_AT: usize = 64;

/// Of the beginning of each tensor, which training leaves in no two files alike.
pub fn fingerprint(tensors: &[Vec<f32>]) -> u64 {
    let mut hash = Fnv1a::default();
    for x in tensors.iter().flat_map(|tensor| tensor.iter().take(LOOKED_AT)) {
        hash.add(&x.to_le_bytes());
    }
    hash.value()
}
