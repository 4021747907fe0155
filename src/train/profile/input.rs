//! How fast batches are read from a set, beside which nothing else runs.

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use crate::data::loader::{Loader, READY};
use crate::data::packing::PackingSettings;
use crate::data::source::Source;
use crate::error::Result;
use crate::recipe::{Recipe, ViewsKind};

/// Batches that are timed.
const BATCHES: usize = 8;

/// The input of a training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Input {
    /// Threads that decode, and make views where the recipe leaves that to the host.
    pub workers: usize,
    /// Whether the recipe leaves views to a device, so that batches hold decoded images.
    pub pictures: bool,
    /// Mean seconds from one batch to the next.
    pub seconds: f64,
    /// Images of a batch, on average.
    pub images: f64,
}

impl Input {
    /// Reads batches of a training of `recipe` on `source`: what was made ready before anybody asked is passed over.
    ///
    /// # Errors
    /// A recipe or a set that cannot be loaded; too many unreadable images.
    pub fn measure(recipe: &Recipe, source: Arc<dyn Source>) -> Result<Self> {
        let workers = PackingSettings::train(recipe)?.workers;
        let mut loader = Loader::train(source, recipe, None)?;
        for _ in 0..=READY {
            loader.next_batch()?;
        }
        let (begun, mut images) = (Instant::now(), 0);
        for _ in 0..BATCHES {
            images += loader.next_batch()?.batch.images;
        }
        let seconds = begun.elapsed().as_secs_f64() / BATCHES as f64;
        let pictures = recipe.data.views == ViewsKind::Device;
        Ok(Self { workers, pictures, seconds, images: images as f64 / BATCHES as f64 })
    }
}
