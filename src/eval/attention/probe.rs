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
    /// Over up to 16 images of `source`, as many as a batch holds, evenly spread over it. None where none of them can be
    /// read.
    ///
    /// # Errors
    /// A recipe that cannot be carried out.
    pub fn new(recipe: &Recipe, classes: usize, source: Arc<dyn Source>) -> Result<Option<Self>> {
        let mut recipe = recipe.clone();
        recipe.data.max_unreadable = 1.0;
        let wanted = IMAGES.min(source.len());
        let Some(mut batch) = first_readable(&recipe, source.clone(), wanted)? else { return Ok(None) };
        // Those beyond the budget are the last of the source: as many as it holds, spread again.
        if batch.images < wanted
            && let Some(spread) = first_readable(&recipe, source, batch.images)?
        {
            batch = spread;
        }
        let images = readable(&batch);
        // What is kept is as large as the budget, of which these images fill a part.
        let (prefix, tokens) = (recipe.model.prefix(), batch.live_tokens().next_multiple_of(128));
        let batch = batch.with_prefix(prefix, prefix, tokens);
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

/// The first batch of `count` images, spread over `source`, in which one can be read.
fn first_readable(recipe: &Recipe, source: Arc<dyn Source>, count: usize) -> Result<Option<PackedBatch>> {
    let mut loader = Loader::eval(Arc::new(Chosen::spread(source, count)), recipe, 0)?;
    while let Some(loaded) = loader.next().transpose()? {
        if readable(&loaded.batch) > 0 {
            return Ok(Some(loaded.batch));
        }
    }
    Ok(None)
}

fn readable(batch: &PackedBatch) -> usize {
    batch.weights.iter().filter(|weight| **weight > 0.0).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::batch::Targets;
    use crate::data::source::Image;
    use crate::error::Error;

    /// 100 images whose classes are their numbers, and of which the first cannot be read.
    struct Numbered {
        unreadable: usize,
    }

    impl Source for Numbered {
        fn len(&self) -> usize {
            100
        }

        fn name(&self, index: usize) -> String {
            index.to_string()
        }

        fn label(&self, index: usize) -> usize {
            index
        }

        fn size(&self, _: usize) -> Result<(usize, usize)> {
            Ok((32, 32))
        }

        fn load(&self, index: usize, channels: usize) -> Result<Image> {
            match index < self.unreadable {
                true => Err(Error::usage(format!("{index}: damaged"))),
                false => Ok(Image { height: 32, width: 32, channels, pixels: vec![9; 32 * 32 * channels] }),
            }
        }
    }

    #[test]
    fn images_are_spread_over_the_source_whatever_a_batch_holds() {
        // Four images of 64 tokens fill the budget.
        let recipe = Recipe::load("digits", &["packing.tokens=256".into()]).unwrap();
        let probe =
            |unreadable| AttentionProbe::new(&recipe, 100, Arc::new(Numbered { unreadable })).unwrap();
        let all = probe(0).unwrap();
        let Targets::Classes(classes) = &all.batch.targets else { panic!("classes") };
        let mut numbers = classes[..all.batch.images].to_vec();
        numbers.sort_unstable();
        assert_eq!((all.images(), numbers), (4, vec![0, 25, 50, 75]));
        // The first batch of images 0, 6, 12 and 18 says nothing.
        assert!(probe(20).unwrap().images() > 0);
        assert!(probe(100).is_none());
    }
}
