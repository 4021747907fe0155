//! Attention over a fixed batch, again and again while a model is trained.

use std::sync::Arc;

use super::{BlockAttention, blocks, uniform_entropy};
use crate::data::batch::PackedBatch;
use crate::data::loader::Loader;
use crate::data::source::Source;
use crate::data::source::chosen::Chosen;
use crate::error::Result;
use crate::eval::model::{Forward, Keep, Model, WithParams};
use crate::recipe::Recipe;

/// Images of the batch, at most.
const IMAGES: usize = 16;

/// A batch of validation images, and the model that runs over it on the CPU.
pub struct AttentionProbe {
    model: Model,
    batch: PackedBatch,
    /// Images that could be read.
    images: usize,
}

impl AttentionProbe {
    /// Over up to 16 images of `source`, evenly spread over it, as many as a batch holds. None where there is none that can
    /// be read.
    ///
    /// # Errors
    /// A recipe that cannot be carried out.
    pub fn new(recipe: &Recipe, classes: usize, source: Arc<dyn Source>) -> Result<Option<Self>> {
        let mut recipe = recipe.clone();
        recipe.data.max_unreadable = 1.0;
        let mut loader = Loader::eval(Arc::new(Chosen::spread(source, IMAGES)), &recipe, 0)?;
        let Some(loaded) = loader.next().transpose()? else { return Ok(None) };
        let images = loaded.batch.weights.iter().filter(|weight| **weight > 0.0).count();
        if images == 0 {
            return Ok(None);
        }
        // What is kept is as large as the budget, of which these images fill a part.
        let (prefix, tokens) = (recipe.model.prefix(), loaded.batch.live_tokens().next_multiple_of(128));
        let batch = loaded.batch.with_prefix(prefix, prefix, tokens);
        let model = Model::new(&recipe, classes, batch.tokens(), batch.slots(), Keep::Blocks)?;
        Ok(Some(Self { model, batch, images }))
    }

    /// Number of images.
    pub fn images(&self) -> usize {
        self.images
    }

    /// Mean over the queries of the entropy of uniform attention.
    pub fn uniform_entropy(&self) -> f64 {
        uniform_entropy(&self.batch)
    }

    /// Attention of every block with these weights, in the order of the model's parameters.
    ///
    /// # Errors
    /// Never on the CPU.
    pub fn measure(&mut self, params: &[Vec<f32>]) -> Result<Vec<BlockAttention>> {
        let mut model = WithParams { model: &mut self.model, params };
        model.logits(&self.batch)?;
        blocks(&model, &self.batch)
    }
}
