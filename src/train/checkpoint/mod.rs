//! Checkpoints: safetensors files that hold a model and, for `last`, the state of its training.
//!
//! | metadata | content |
//! |---|---|
//! | `trencadis` | version of this layout |
//! | `recipe` | the resolved recipe, TOML |
//! | `classes` | class names, JSON |
//! | `tokenizer` | `tokenizer.json` of a model of texts |
//! | `progress` | step, images seen, best metric, state of the loader, JSON |
//! | `optimizer_step` | steps of the optimiser; only with training state |
//!
//! The model's tensors stand under their own names, so that every checkpoint is a self-contained
//! model for evaluation, prediction and other programs. Where a moving average is kept, these are the
//! averaged weights. Training state stands beside them: `training.m.<name>`, with AdamW and LAMB `training.v.<name>`,
//! with Adafactor `training.statistics.<name>` (means over rows, then over columns, of a matrix that is factored), and,
//! with a moving average, the raw weights as `training.weights.<name>`. All of it is f32, in which Adafactor's bf16 is
//! exact.
//!
//! # A kill at any time
//!
//! `last.safetensors` holds everything that resuming needs in one file, which a rename replaces
//! as a whole: there is no pair of files that could disagree. What lies beside it is ordered by
//! [`Snapshot::save`]: `best` and `step-N` take their places before `last`. Killed in between, the run
//! resumes from the older `last`, repeats the steps since, and writes the same files again; the
//! other order could lose a best model, as `last` would already claim that it had been saved.
//! The metric lines of later steps are cut off on resuming (`metrics`).
//!
//! # Several ranks
//!
//! No rank ever holds more than its own slices and one unit. Into the one file tensors go as the first rank gathers
//! them, unit by unit; from it each rank reads its slices, on whatever mesh. With `train.save_as = "sharded"` every
//! rank writes what it has to a file of its own instead, beside an index that is renamed into place once all are
//! whole (`weights::sharded`): what replaces what is the same, with the index in the place of the file.

mod load;
mod save;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use load::{SavedTraining, load_header, load_model, open_training};
pub use save::{Content, Snapshot};

use crate::data::packing::PackingStats;
use crate::data::tokenizer::Tokenizer;
use crate::{Error, Result};

const VERSION: &str = "1";
const TOKENIZER: &str = "tokenizer";
const TRAINING: &str = "training.";
const FIRST: &str = "training.m.";
const SECOND: &str = "training.v.";
const STATISTICS: &str = "training.statistics.";
const WEIGHTS: &str = "training.weights.";

/// What a checkpoint says about its model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Header {
    /// The resolved recipe, TOML.
    pub recipe: String,
    /// Class names in the order of the logits.
    pub classes: Vec<String>,
    /// How texts become tokens, where the model knows texts: a `tokenizer.json`.
    pub tokenizer: Option<String>,
    /// How far the training had come.
    pub progress: Progress,
}

/// How far a training has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Completed steps.
    pub step: u64,
    /// Images seen, repetitions included.
    pub images_seen: u64,
    /// How well the batches so far were filled.
    pub packing: PackingStats,
    /// Step of the newest evaluation.
    pub evaluated: Option<u64>,
    /// The best evaluation.
    pub best: Option<Best>,
    /// Where the loader continues.
    pub loader: serde_json::Value,
}

/// The best evaluation of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Completed steps at the evaluation.
    pub step: u64,
    /// Top-1 accuracy.
    pub metric: f64,
}

impl Header {
    /// The tokenizer of a model of texts; none of another. `path` is where the header is from.
    ///
    /// # Errors
    /// A damaged one.
    pub fn tokenizer(&self, path: &Path) -> Result<Option<Arc<Tokenizer>>> {
        let read = |json: &String| Tokenizer::from_json(json.clone()).map(Arc::new);
        self.tokenizer.as_ref().map(read).transpose().map_err(|why| Error::file(path, why))
    }

    /// The metadata of a file that holds such a model.
    ///
    /// # Errors
    /// Never for class names that are text.
    pub fn metadata(&self) -> Result<BTreeMap<String, String>> {
        let json = |value: serde_json::Result<String>| value.map_err(Error::failure);
        let mut metadata = BTreeMap::from([
            // Other programs expect to be told who lays out tensors this way.
            ("format".into(), "pt".into()),
            ("trencadis".into(), VERSION.into()),
            ("recipe".into(), self.recipe.clone()),
            ("classes".into(), json(serde_json::to_string(&self.classes))?),
            ("progress".into(), json(serde_json::to_string(&self.progress))?),
        ]);
        metadata.extend(self.tokenizer.clone().map(|tokenizer| (TOKENIZER.to_owned(), tokenizer)));
        Ok(metadata)
    }

    fn read(path: &Path, metadata: &BTreeMap<String, String>) -> Result<Self> {
        match metadata.get("trencadis").map(String::as_str) {
            None => {
                return Err(Error::file(
                    path,
                    "is not a trencadis checkpoint (its metadata names no recipe)",
                ));
            }
            Some(VERSION) => {}
            Some(other) => {
                return Err(Error::file(
                    path,
                    format_args!(
                        "has checkpoint layout {other}, and this trencadis reads {VERSION}; use the version that wrote it"
                    ),
                ));
            }
        }
        Ok(Self {
            recipe: metadata.get("recipe").ok_or_else(|| damaged(path, "recipe"))?.clone(),
            classes: parse(path, metadata, "classes")?,
            tokenizer: metadata.get(TOKENIZER).cloned(),
            progress: parse(path, metadata, "progress")?,
        })
    }
}

fn parse<T: DeserializeOwned>(path: &Path, metadata: &BTreeMap<String, String>, key: &str) -> Result<T> {
    metadata.get(key).and_then(|text| serde_json::from_str(text).ok()).ok_or_else(|| damaged(path, key))
}

fn damaged(path: &Path, key: &str) -> Error {
    Error::file(path, format_args!("is damaged: its metadata has no readable {key}"))
}
