//! Vision Transformers.

pub mod vit;
