//! Vision Transformers and the recipes that describe them.

pub mod recipe;
