//! Vision Transformers and the recipes that describe them.

pub mod forward;
pub mod load;
pub mod recipe;
pub mod shapes;
mod validate;
pub mod vit;
