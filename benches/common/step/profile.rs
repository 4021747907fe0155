//! What the parts of a training step take, each by itself.

use trencadis::Result;
use trencadis::autograd::Workload;
use trencadis::train::profile::{self, Row};

use super::super::gpu::{Gpu, table};
use super::training::Training;

/// Columns of the table of parts.
pub const HEADER: &str = "recipe,budget,operation,shape,launches,microseconds,share";

/// A line of the table, where all parts take `total` seconds.
pub fn line(row: &Row, recipe: &str, budget: usize, total: f64) -> String {
    table::csv([
        recipe.into(),
        budget.to_string(),
        row.operation.clone(),
        row.shape.clone(),
        row.launches.to_string(),
        format!("{:.2}", 1e6 * row.seconds),
        format!("{:.4}", row.seconds / total),
    ])
}

/// Times every part, the slowest operations first. The training is of no use afterwards.
///
/// # Errors
/// A failed device.
pub fn rows(gpu: &Gpu, training: &Training) -> Result<Vec<Row>> {
    let work = Workload::of(&training.batches()[0]);
    // The table has no bytes.
    let spans = profile::device::spans(training.engine(), &gpu.device, &work, [0.0; 2])?;
    Ok(profile::by_operation(&spans))
}
