//! One self-contained page that compares runs: what `trencadis report` writes.
//!
//! It shows what the runs' folders hold: recipes, `metrics.jsonl`, under `eval/` what `trencadis eval --suite` has left, and
//! the predictions of their models on a few images. Parts without data are left out.

mod attention;
mod charts;
mod log;
mod page;
mod samples;

pub use log::RunLog;
pub use page::page;
pub use samples::{Sample, samples};
