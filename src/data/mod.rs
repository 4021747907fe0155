//! From files to packed batches.

pub mod batch;
pub mod positions;
pub mod source;
