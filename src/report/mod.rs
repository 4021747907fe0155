//! One self-contained page that compares runs: what `trencadis report` writes.
//!
//! It takes what the runs' folders hold: recipes, `metrics.jsonl`, and under `eval/` what the evaluations of `trencadis eval
//! --suite` have left. Parts without data are left out.

mod charts;
mod log;
mod page;
mod samples;

pub use log::RunLog;
pub use page::page;
pub use samples::{Sample, samples};
