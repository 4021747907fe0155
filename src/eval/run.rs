//! A model over a whole set of images.

use std::sync::Arc;

use super::metrics::{Classification, ClassificationReport};
use super::model::Forward;
use crate::autograd::Workload;
use crate::data::batch::{PackedBatch, Targets};
use crate::data::loader::{Loader, LoaderReport};
use crate::data::packing::PackingStats;
use crate::data::source::Source;
use crate::error::Result;
use crate::recipe::Recipe;

/// Class indices of a batch; of soft targets the largest.
pub fn labels(batch: &PackedBatch) -> Vec<i32> {
    match &batch.targets {
        Targets::Classes(classes) => classes.clone(),
        Targets::Soft(soft) => {
            let classes = soft.len() / batch.slots().max(1);
            let largest = |row: &[f32]| (0..classes).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap_or(0);
            soft.chunks(classes.max(1)).map(|row| largest(row) as i32).collect()
        }
    }
}

/// Result of [`evaluate`].
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Metrics over all readable images.
    pub metrics: ClassificationReport,
    /// How the images were packed; `downscaled` counts those that had no place at the resolution asked for.
    pub packing: PackingStats,
    /// Images that could not be read.
    pub loading: LoaderReport,
    /// Mean tokens per image, prefix tokens included.
    pub tokens_per_image: f64,
    /// Mean forward FLOPs per image.
    pub flops_per_image: f64,
}

/// Runs `model` over `source` at `resolution` (0: the recipe's), images packed. `stop` ends it
/// early, with `None`.
///
/// # Errors
/// Unreadable data beyond the recipe's share, an image that has no place in the position tables, a failed device.
pub fn evaluate(
    model: &mut dyn Forward,
    source: Arc<dyn Source>,
    recipe: &Recipe,
    resolution: usize,
    stop: &dyn Fn() -> bool,
) -> Result<Option<Evaluation>> {
    let mut loader = Loader::eval(source, recipe, resolution)?;
    let mut counts = Classification::new(model.classes(), recipe.train.loss);
    let mut packing = PackingStats::default();
    let mut flops = 0.0;
    while let Some(loaded) = loader.next().transpose()? {
        if stop() {
            return Ok(None);
        }
        let batch = &loaded.batch;
        // All of its images were unreadable.
        if batch.images == 0 {
            continue;
        }
        counts.add(model.logits(batch)?, &labels(batch), &batch.weights);
        flops += model.flops(&Workload::of(batch));
        packing.add(&loaded.stats);
    }
    let per_image = |x: f64| if packing.images == 0 { 0.0 } else { x / packing.images as f64 };
    Ok(Some(Evaluation {
        metrics: counts.report(),
        loading: loader.report().clone(),
        tokens_per_image: per_image(packing.live as f64),
        flops_per_image: per_image(flops),
        packing,
    }))
}
