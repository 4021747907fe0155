//! Classes by what texts say of them: an image is of the class whose texts its vector is nearest to (CLIP, section 3.1).

use std::sync::Arc;

use super::model::{Features, Forward, Observed};
use super::towers::{Embed, Score};
use crate::autograd::Workload;
use crate::autograd::graph::Modality;
use crate::cpu::gemm::linear;
use crate::data::batch::PackedBatch;
use crate::data::texts::TextSettings;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::recipe::Recipe;

/// A model of images and texts that tells classes. A class has the mean of the unit vectors of its texts, made a unit
/// vector again; logits are the scores of image and class.
pub struct ZeroShot<'a> {
    towers: Box<dyn Embed + 'a>,
    texts: TextSettings,
    /// Tokens and patch size of a batch of images.
    images: [usize; 2],
    score: Score,
    classes: usize,
    /// `[K, D]`.
    vectors: Vec<f32>,
    logits: Vec<f32>,
}

impl<'a> ZeroShot<'a> {
    /// Tells `classes` by `prompts`, templates with `{}` in the place of a class.
    ///
    /// # Errors
    /// A text without a token or with too many, no template; a failed device.
    pub fn new(
        towers: Box<dyn Embed + 'a>,
        recipe: &Recipe,
        texts: TextSettings,
        classes: &[String],
        prompts: &[String],
    ) -> Result<Self> {
        let images = [recipe.packing.tokens, recipe.model.patch_dim()];
        let score = towers.score()?;
        let (vectors, logits) = (Vec::new(), Vec::new());
        let mut model = Self { towers, texts, images, score, classes: 0, vectors, logits };
        model.set_classes(classes, prompts)?;
        Ok(model)
    }

    /// Unit vectors `[texts, D]` of texts with these tokens.
    fn embed(&mut self, tokens: &[Vec<u16>]) -> Result<Vec<f32>> {
        let (width, mut vectors) = (self.towers.width(), Vec::new());
        for tokens in tokens.chunks(self.texts.slots) {
            let batch = self.texts.alone(tokens, self.images);
            let rows = self.towers.embed(Modality::Texts, &batch)?;
            vectors.extend_from_slice(&rows[..tokens.len() * width]);
        }
        normalise(&mut vectors, width);
        Ok(vectors)
    }
}

/// Makes every row of `width` values a unit vector; zeros stay.
pub fn normalise(rows: &mut [f32], width: usize) {
    for row in rows.chunks_exact_mut(width) {
        let norm = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        if norm > 0.0 {
            row.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        }
    }
}

impl Features for ZeroShot<'_> {
    fn pooled(&mut self, batch: &PackedBatch) -> Result<Vec<f32>> {
        self.towers.embed(Modality::Images, batch).map(<[f32]>::to_vec)
    }

    fn observed(&self) -> Result<&dyn Observed> {
        Err(Error::usage(
            "maps of attention are of models that were trained on classes, and this one was trained on texts",
        ))
    }

    fn towers(&mut self) -> Option<(&mut dyn Embed, Arc<Tokenizer>)> {
        Some((&mut *self.towers, self.texts.tokenizer.clone()))
    }
}

impl Forward for ZeroShot<'_> {
    fn classes(&self) -> usize {
        self.classes
    }

    fn flops(&self, work: &Workload) -> f64 {
        self.towers.flops(work)
    }

    fn logits(&mut self, batch: &PackedBatch) -> Result<&[f32]> {
        let width = self.towers.width();
        let mut vectors = self.towers.embed(Modality::Images, batch)?.to_vec();
        normalise(&mut vectors, width);
        self.logits.resize(batch.slots() * self.classes, 0.0);
        linear(&mut self.logits, &vectors, &self.vectors, None, width, self.classes);
        let (used, unused) = self.logits.split_at_mut(batch.images * self.classes);
        used.iter_mut().for_each(|x| *x = self.score.factor.mul_add(*x, self.score.bias));
        unused.fill(0.0);
        Ok(&self.logits)
    }

    fn set_classes(&mut self, classes: &[String], prompts: &[String]) -> Result<()> {
        Recipe::check_prompts(prompts, "the list of prompts")?;
        let width = self.towers.width();
        let mut mean = vec![0.0; classes.len() * width];
        for prompt in prompts {
            let tokens = self.texts.encode_classes(prompt, classes)?;
            mean.iter_mut().zip(self.embed(&tokens)?).for_each(|(sum, x)| *sum += x);
        }
        normalise(&mut mean, width);
        (self.classes, self.vectors) = (classes.len(), mean);
        Ok(())
    }
}
