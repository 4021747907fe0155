//! Vision Transformers.

pub mod limits;
pub mod vit;
