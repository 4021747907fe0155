//! A model over a whole set of images.

use std::sync::Arc;

use super::metrics::{Classification, ClassificationReport};
use super::model::Forward;
use crate::autograd::Workload;
use crate::data::batch::{Mixture, PackedBatch, Targets};
use crate::data::loader::{Loader, LoaderReport, Share};
use crate::data::packing::PackingStats;
use crate::data::source::Source;
use crate::error::Result;
use crate::parallel::MeshGroups;
use crate::recipe::Recipe;

/// Class indices of a batch; of soft targets the largest.
pub fn labels(batch: &PackedBatch) -> Vec<i32> {
    match &batch.targets {
        Targets::Classes(classes) => classes.clone(),
        Targets::Mixed(mixtures) => mixtures.iter().map(Mixture::largest).collect(),
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
    evaluate_on(&MeshGroups::alone(), model, source, recipe, resolution, stop)?
}

/// The same on several ranks, all of which call it and get the same result; of unreadable images they report the sum
/// and one example. A rank that should stop stops all. The inner error is that of all ranks, which are whole after it:
/// unreadable data.
///
/// # Errors
/// The others of [`evaluate`]; a rank that has failed.
pub fn evaluate_on(
    ranks: &MeshGroups,
    model: &mut dyn Forward,
    source: Arc<dyn Source>,
    recipe: &Recipe,
    resolution: usize,
    stop: &dyn Fn() -> bool,
) -> Result<Result<Option<Evaluation>>> {
    let share = Share { part: ranks.data.rank(), parts: ranks.data.size() };
    let mut loader = Loader::eval_share(source, recipe, resolution, share)?;
    let mut counts = Classification::new(model.classes(), recipe.train.loss);
    let mut packing = PackingStats::default();
    let mut flops = 0.0;
    loop {
        let mut loaded = match ranks.agree(loader.next().transpose())? {
            Ok(Some(loaded)) => loaded,
            Ok(None) => break,
            Err(error) => return Ok(Err(error)),
        };
        if ranks.any(stop())? {
            return Ok(Ok(None));
        }
        packing.add(&loaded.stats);
        ranks.leave_out_unread(&mut loaded.batch.weights, &[])?;
        let batch = &loaded.batch;
        // All of its images were unreadable. Of several ranks each runs as many batches as the others.
        if batch.images == 0 && ranks.is_alone() {
            continue;
        }
        counts.add(model.logits(batch)?, &labels(batch), &batch.weights);
        flops += model.flops(&Workload::of(batch));
    }
    counts.reduce(ranks)?;
    let mut flops = [flops];
    ranks.sum_over_data(&mut flops)?;
    let loading = reduce(loader.report().clone(), ranks)?;
    let per_image = |x: f64| if packing.images == 0 { 0.0 } else { x / packing.images as f64 };
    Ok(Ok(Some(Evaluation {
        metrics: counts.report(),
        loading,
        tokens_per_image: per_image(packing.live as f64),
        flops_per_image: per_image(flops[0]),
        packing,
    })))
}

/// The reports of all data ranks, with one example.
fn reduce(mut report: LoaderReport, ranks: &MeshGroups) -> Result<LoaderReport> {
    if ranks.is_alone() {
        return Ok(report);
    }
    let mut counts = [report.drawn, report.unreadable];
    ranks.sum_over_data(&mut counts)?;
    (report.drawn, report.unreadable) = (counts[0], counts[1]);
    report.examples = ranks.first_text(report.examples.first().map(String::as_str))?.into_iter().collect();
    report.newest = report.examples.first().cloned();
    Ok(report)
}
