//! A model over every image of a source, once.

use std::sync::Arc;
use std::time::Instant;

use super::setting::{Setting, Size};
use crate::autograd::Workload;
use crate::data::batch::PackedBatch;
use crate::data::loader::{Loader, Share};
use crate::data::source::Source;
use crate::error::Result;
use crate::eval::model::Features;
use crate::recipe::Recipe;

/// What is taken of a model: it runs a batch and returns a vector a slot.
pub type Of = fn(&mut dyn Features, &PackedBatch) -> Result<Vec<f32>>;

/// A vector of every image that can be read, in the order of the source.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Length of a vector.
    pub width: usize,
    /// `[images, width]`.
    pub values: Vec<f32>,
    /// `[images]` index in the source, rising.
    pub samples: Vec<usize>,
    /// Mean tokens of an image, prefix tokens included.
    pub tokens: f64,
    /// Mean FLOPs of the forward pass of an image.
    pub flops: f64,
    /// Mean seconds of the forward pass of an image, decoding not included.
    pub seconds: f64,
    /// Images that the position tables or the budget did not hold at the size asked for, and that were made smaller.
    pub downscaled: u64,
    /// Images that could not be read.
    pub unreadable: u64,
}

impl Pass {
    /// Takes `of` of `model`, which `recipe` describes, for the images of `source` at `setting`; none where no image can be
    /// read.
    ///
    /// # Errors
    /// Unreadable data beyond the recipe's share, a setting that does not go with the recipe, a failed device.
    pub fn over(
        model: &mut dyn Features,
        recipe: &Recipe,
        source: Arc<dyn Source>,
        setting: Setting,
        of: Of,
    ) -> Result<Option<Self>> {
        let (packing, recipe) = (setting.packing(recipe)?, setting.applied(recipe));
        let mut rows: Vec<(usize, Vec<f32>)> = Vec::with_capacity(source.len());
        let mut loader = Loader::eval_as(source, &recipe, packing, Share::ALL)?;
        let (mut images, mut tokens, mut flops, mut seconds) = (0, 0, 0.0, 0.0);
        let (mut downscaled, mut width) = (0, 0);
        while let Some(loaded) = loader.next().transpose()? {
            downscaled += loaded.stats.downscaled;
            let batch = &loaded.batch;
            if batch.images == 0 {
                continue;
            }
            if images == 0 {
                // The first run makes room and warms up; it is not timed.
                of(model, batch)?;
            }
            let start = Instant::now();
            let values = of(model, batch)?;
            seconds += start.elapsed().as_secs_f64();
            width = values.len() / batch.slots();
            for slot in (0..batch.images).filter(|slot| batch.weights[*slot] > 0.0) {
                rows.push((batch.sample_ids[slot] as usize, values[slot * width..][..width].to_vec()));
            }
            images += batch.images;
            tokens += batch.live_tokens();
            flops += model.flops(&Workload::of(batch));
        }
        let unreadable = loader.report().unreadable;
        if rows.is_empty() {
            return Ok(None);
        }
        // Whatever they were packed with: all that follows goes by the order of the source.
        rows.sort_by_key(|(sample, _)| *sample);
        let mean = |total: f64| total / images as f64;
        Ok(Some(Self {
            width,
            samples: rows.iter().map(|(sample, _)| *sample).collect(),
            values: rows.into_iter().flat_map(|(_, row)| row).collect(),
            tokens: mean(tokens as f64),
            flops: mean(flops),
            seconds: mean(seconds),
            // An image for so many tokens always is made to fit.
            downscaled: if matches!(setting.size, Size::Tokens(_)) { 0 } else { downscaled },
            unreadable,
        }))
    }

    /// Number of images.
    pub fn images(&self) -> usize {
        self.samples.len()
    }

    /// The vector of one image, by its place.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..][..self.width]
    }

    /// The vectors of these images, by their place.
    pub fn rows(&self, rows: &[usize]) -> impl Iterator<Item = &[f32]> + Clone {
        rows.iter().map(|&row| self.row(row))
    }

    /// The first image with a value that is no finite number.
    pub fn broken(&self) -> Option<usize> {
        let broken = self.values.iter().position(|value| !value.is_finite())?;
        Some(self.samples[broken / self.width])
    }
}
