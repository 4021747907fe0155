//! Batches of random pixels, as training on a recipe meets them: what is measured needs no data.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rand::Rng as _;

use crate::data::assemble::Assembler;
use crate::data::batch::{PREFIX, PackedBatch, Patches};
use crate::data::packing::PackingSettings;
use crate::data::planner::Planner;
use crate::data::source::{Image, Source};
use crate::data::view::ViewSettings;
use crate::error::{Error, Result};
use crate::recipe::{MixConfig, Recipe};
use crate::rng::{Purpose, Stream};

/// Images that the sizes are drawn from.
const IMAGES: usize = 1 << 15;

/// Images that have a size, up to 1:2 or 2:1, and no pixels.
struct Sizes {
    classes: usize,
}

impl Source for Sizes {
    fn len(&self) -> usize {
        IMAGES
    }

    fn name(&self, index: usize) -> String {
        format!("image {index}")
    }

    fn label(&self, index: usize) -> usize {
        index * 37 % self.classes
    }

    fn size(&self, index: usize) -> Result<(usize, usize)> {
        let mut stream = Stream::new(3, 0, index as u64, Purpose::Resolution);
        let aspect = (2.0 * stream.uniform() - 1.0).exp2().sqrt();
        Ok(((512.0 * aspect) as usize, (512.0 / aspect) as usize))
    }

    fn load(&self, index: usize, _: usize) -> Result<Image> {
        Err(Error::failure(format!("image {index} has no pixels")))
    }
}

/// Batches as training on `recipe` meets them, of random pixels.
///
/// # Errors
/// A recipe that is not valid.
pub fn batches(recipe: &Recipe, classes: usize, count: usize) -> Result<Vec<PackedBatch>> {
    let settings = PackingSettings::train(recipe)?;
    let source = Arc::new(Sizes { classes });
    let mut planner = Planner::new(source.clone(), settings.clone(), None)?;
    let mut assembler =
        Assembler::new(&*source, settings, ViewSettings::eval(recipe), MixConfig::default(), 1);
    // No image is loaded: the batch is laid out, and its patches are filled here.
    let stop = AtomicBool::new(true);
    let mut made = Vec::with_capacity(count);
    while made.len() < count
        && let Some(plan) = planner.next_batch()?
    {
        let mut batch = assembler.assemble(&plan, &stop).batch;
        let mut random = Stream::new(recipe.train.seed, 0, made.len() as u64, Purpose::Augment);
        let live = batch.live_tokens();
        if let Patches::U8(pixels) = &mut batch.patches {
            let rows = pixels.chunks_exact_mut(batch.patch_dim).zip(&batch.positions).take(live);
            rows.filter(|(_, position)| **position != PREFIX).for_each(|(row, _)| random.fill_bytes(row));
        }
        made.push(batch);
    }
    Ok(made)
}
