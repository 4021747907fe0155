//! Evaluation: a recorded forward pass and the metrics over its results.

pub mod attention;
pub mod chart;
pub mod device;
pub mod forward;
pub mod metrics;
pub mod model;
pub mod open;
pub mod predict;
pub mod probe;
pub mod retrieval;
pub mod run;
pub mod suite;
pub mod towers;
pub mod trained;
pub mod zero_shot;
