//! Vision Transformers.

pub mod limits;
pub mod two_tower;
pub mod vit;
