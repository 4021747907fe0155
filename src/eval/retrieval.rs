//! Whether the text of an image is found among those of its batch.

use std::sync::Arc;

use super::metrics::{Classification, ClassificationReport};
use super::towers::Embed;
use super::zero_shot::normalise;
use crate::autograd::graph::Modality;
use crate::cpu::gemm::linear;
use crate::data::loader::{Loader, LoaderReport};
use crate::data::source::Source;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::recipe::{LossKind, Recipe};

/// Images whose scores with all texts of a batch are held at a time.
const ROWS: usize = 256;

/// Runs `towers` over the pairs of `source`, packed in order: of each batch, how many images have a higher score with
/// their own text than with any other, the softmax loss of these scores, and what could not be read. `stop` ends it early,
/// with `None`.
///
/// # Errors
/// Unreadable data beyond the recipe's share, a failed device.
pub fn retrieval(
    towers: &mut dyn Embed,
    source: Arc<dyn Source>,
    recipe: &Recipe,
    tokenizer: Arc<Tokenizer>,
    stop: &dyn Fn() -> bool,
) -> Result<Option<(ClassificationReport, LoaderReport)>> {
    let mut loader = Loader::eval_texts(source, recipe, tokenizer)?;
    let (width, score) = (towers.width(), towers.score()?);
    let mut counts: Option<Classification> = None;
    while let Some(loaded) = loader.next().transpose()? {
        if stop() {
            return Ok(None);
        }
        let batch = &loaded.batch;
        let (slots, images) = (batch.slots(), batch.images);
        if images == 0 {
            continue;
        }
        let mut vectors = |modality| -> Result<Vec<f32>> {
            let mut vectors = towers.embed(modality, batch)?.to_vec();
            normalise(&mut vectors, width);
            Ok(vectors)
        };
        let (of_images, of_texts) = (vectors(Modality::Images)?, vectors(Modality::Texts)?);
        let counts = counts.get_or_insert_with(|| Classification::new(slots, LossKind::Softmax));
        let labels: Vec<i32> = (0..slots as i32).collect();
        let mut scores = vec![0.0; ROWS.min(images) * slots];
        for first in (0..images).step_by(ROWS) {
            let rows = first..images.min(first + ROWS);
            let scores = &mut scores[..rows.len() * slots];
            linear(scores, &of_images[rows.start * width..rows.end * width], &of_texts, None, width, slots);
            for row in scores.chunks_exact_mut(slots) {
                for (text, x) in row.iter_mut().enumerate() {
                    // A slot without a text is nobody's.
                    let counts = text < images && batch.weights[text] > 0.0;
                    *x = if counts { score.factor.mul_add(*x, score.bias) } else { f32::MIN };
                }
            }
            counts.add(scores, &labels[rows.clone()], &batch.weights[rows]);
        }
    }
    let counts = counts.unwrap_or_else(|| Classification::new(1, LossKind::Softmax));
    Ok(Some((counts.report(), loader.report().clone())))
}
