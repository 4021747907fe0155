//! Class probabilities of single images.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::attention::{PoolingMap, PoolingMaps, check_pooling};
use super::metrics::probability::probabilities;
use super::trained::Trained;
use crate::data::loader::Loader;
use crate::data::source::files::Files;
use crate::error::Result;

/// The most probable classes of an image.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// The image file.
    pub image: String,
    /// Class and probability, most probable first.
    pub top: Vec<Scored>,
    /// What the image's vector attends to, where that was asked for.
    #[serde(skip)]
    pub attention: Option<PoolingMap>,
    /// Why there is no prediction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A class with its probability.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scored {
    /// Name of the class.
    pub class: String,
    /// Softmax probability; of a model trained with the sigmoid loss, each class's own.
    pub probability: f64,
}

/// Classifies `images`, packed together, at `resolution` (0: the recipe's), with maps of `attention` where they are wanted of
/// a model that keeps [`Keep::Pooling`](super::model::Keep::Pooling). An image that cannot be read gets a prediction with
/// `error`.
///
/// # Errors
/// If an image has no place in the position tables; a model that knows no classes, or without such maps; a failed device.
pub fn predict(
    trained: &mut Trained,
    images: Vec<PathBuf>,
    top: usize,
    resolution: usize,
    attention: bool,
) -> Result<Vec<Prediction>> {
    trained.require_classes()?;
    if attention {
        check_pooling(&trained.recipe.model)?;
    }
    let mut recipe = trained.recipe.clone();
    recipe.data.max_unreadable = 1.0;
    let mut predictions: Vec<Prediction> = images
        .iter()
        .map(|path| Prediction {
            image: path.display().to_string(),
            top: Vec::new(),
            attention: None,
            error: None,
        })
        .collect();
    let mut loader = Loader::eval(Arc::new(Files::new(images)), &recipe, resolution)?;
    while let Some(loaded) = loader.next().transpose()? {
        let batch = &loaded.batch;
        // Without a readable image there is nothing to run.
        let logits = if batch.images > 0 { trained.model.logits(batch)? } else { &[] };
        let read = || (0..batch.images).filter(|slot| batch.weights[*slot] > 0.0);
        for slot in read() {
            let logits = &logits[slot * trained.classes.len()..][..trained.classes.len()];
            let probabilities = probabilities(logits, recipe.train.loss);
            predictions[batch.sample_ids[slot] as usize].top = ranked(&probabilities, &trained.classes, top);
        }
        if attention && batch.images > 0 {
            let maps = PoolingMaps::read(trained.model.observed()?)?;
            for slot in read() {
                predictions[batch.sample_ids[slot] as usize].attention = Some(maps.of(batch, slot));
            }
        }
        for (sample, cause) in &loaded.unreadable {
            let prediction = &mut predictions[*sample as usize];
            let cause =
                cause.strip_prefix(&prediction.image).map_or(cause.as_str(), |c| c.trim_start_matches(": "));
            prediction.error = Some(cause.into());
        }
    }
    Ok(predictions)
}

/// The `top` most probable classes; of equal ones the first.
pub(crate) fn ranked(probabilities: &[f64], classes: &[String], top: usize) -> Vec<Scored> {
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]).then(a.cmp(b)));
    order
        .into_iter()
        .take(top)
        .map(|i| Scored { class: classes[i].clone(), probability: probabilities[i] })
        .collect()
}
