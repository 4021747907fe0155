//! From pixels to tokens: normalised patches, prefix tokens.
//!
//! | kernel | result |
//! |---|---|
//! | [`Normalise`] | patches of u8 or f32 as rows of bf16, zeros at prefix tokens and after the last image |
//! | [`Prefix::write`] | learned tokens over the first rows of every image |
//! | [`Prefix::grad`] | their gradient, summed over the images; zeros in the gradient of those rows |

mod normalise;
mod prefix;

pub use normalise::{Normalise, NormaliseParams, Pixels, factors, launch_normalise, row_stride};
pub use prefix::{Prefix, PrefixParams, launch_prefix_grad, launch_prefix_write, prefix_workspace_bytes};

pub use super::registry::patch as instances;
