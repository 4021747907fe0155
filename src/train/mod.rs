//! Training.

pub mod checkpoint;
pub mod distill;
pub mod engine;
pub mod interrupt;
mod journal;
pub mod metrics;
pub mod optimizer;
pub mod plan;
pub mod profile;
pub mod progress;
pub mod report;
mod run;
pub mod run_dir;
pub mod schedule;
pub mod start;
pub mod step;
pub mod tensorboard;
pub(crate) mod terminal;
