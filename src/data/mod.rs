//! From files to packed batches.

pub mod assemble;
pub mod augment;
pub mod balance;
pub mod batch;
pub mod draw;
pub mod dropping;
pub mod estimate;
pub mod fit;
pub mod frame;
pub mod inspect;
pub mod loader;
pub mod mix;
pub mod order;
pub mod packing;
pub mod patchify;
pub mod pictures;
pub mod planner;
pub mod positions;
pub mod preview;
pub mod resolution;
pub mod settings;
pub mod source;
pub mod texts;
pub mod tokenizer;
pub mod view;
