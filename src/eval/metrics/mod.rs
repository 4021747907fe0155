//! Metrics from logits and decisions: the core under every evaluation. Pure functions of numbers, with no image, model or
//! file in sight; sums run in the order of the images, so that a result never depends on how they were packed.

pub mod agreement;
pub mod calibration;
mod classification;
pub mod paired;
pub mod parity;
pub mod probability;
pub mod shape_bias;

pub use classification::{Classification, ClassificationReport, rank};
