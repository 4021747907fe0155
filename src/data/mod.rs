//! From files to packed batches.

pub mod batch;
pub mod source;
