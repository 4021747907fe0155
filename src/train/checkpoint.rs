//! Checkpoints: safetensors files that hold a model and, for `last`, the state of its training.
//!
//! | metadata | content |
//! |---|---|
//! | `trencadis` | version of this layout |
//! | `recipe` | the resolved recipe, TOML |
//! | `classes` | class names, JSON |
//! | `progress` | step, images seen, best metric, state of the loader, JSON |
//! | `optimizer_step` | steps of the optimiser; only with training state |
//!
//! The model's tensors stand under their own names, so that every checkpoint is a self-contained
//! model for evaluation, prediction and other programs. Where a moving average is kept, these are the
//! averaged weights. Training state stands beside them: `training.m.<name>`, `training.v.<name>`,
//! and, with a moving average, the raw weights as `training.weights.<name>`.
//!
//! # A kill at any time
//!
//! `last.safetensors` holds everything that resuming needs in one file, which a rename replaces
//! as a whole: there is no pair of files that could disagree. What lies beside it is ordered by
//! [`Snapshot::save`]: `best` and `step-N` are written before `last`. Killed in between, the run
//! resumes from the older `last`, repeats the steps since, and writes the same files again; the
//! other order could lose a best model, as `last` would already claim that it had been saved.
//! The metric lines of later steps are cut off on resuming (`metrics`).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::engine::TrainState;
use super::run_dir::RunDir;
use crate::autograd::ParamSpec;
use crate::data::packing::PackingStats;
use crate::weights::safetensors::{TensorRef, save_atomic};
use crate::weights::{Policy, Weights, assign};
use crate::{Error, Result};

const VERSION: &str = "1";
const TRAINING: &str = "training.";
const KINDS: [&str; 3] = ["training.m.", "training.v.", "training.weights."];

/// What a checkpoint says about its model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Header {
    /// The resolved recipe, TOML.
    pub recipe: String,
    /// Class names in the order of the logits.
    pub classes: Vec<String>,
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

/// A borrowed state of a training, to be saved. All tensors are in the order of `params`.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot<'a> {
    /// Description.
    pub header: &'a Header,
    /// Names and shapes.
    pub params: &'a [ParamSpec],
    /// Weights, moving average, moments.
    pub state: &'a TrainState<'a>,
}

impl Snapshot<'_> {
    /// Saves into a run, in the order that a kill cannot harm: `best` if the model has
    /// `improved`, `step-N` if it is to be kept, then `last`.
    ///
    /// # Errors
    /// [`Error::Failure`] if a file cannot be written; `last` then is the former one.
    pub fn save(&self, run: &RunDir, improved: bool, keep: bool) -> Result<()> {
        if improved {
            self.save_model(&run.best())?;
        }
        if keep {
            self.save_model(&run.step(self.header.progress.step))?;
        }
        self.save_training(&run.last())
    }

    /// Saves the model alone: the moving average where there is one.
    ///
    /// # Errors
    /// [`Error::Failure`] if the file cannot be written.
    pub fn save_model(&self, path: &Path) -> Result<()> {
        save_model(path, self.header, self.params, self.model())
    }

    /// The weights that are used: the moving average where there is one.
    fn model(&self) -> &[Vec<f32>] {
        self.state.ema.as_ref().unwrap_or(&self.state.weights)
    }

    /// Saves the model with everything that resuming needs.
    ///
    /// # Errors
    /// [`Error::Failure`] if the file cannot be written.
    pub fn save_training(&self, path: &Path) -> Result<()> {
        let TrainState { weights, ema, m, v, optimizer_step } = self.state;
        let mut tensors = named(self.params, "", self.model());
        tensors.extend(named(self.params, "training.m.", m));
        tensors.extend(named(self.params, "training.v.", v));
        if ema.is_some() {
            tensors.extend(named(self.params, "training.weights.", weights));
        }
        let mut metadata = self.header.metadata()?;
        metadata.insert("optimizer_step".into(), optimizer_step.to_string());
        save_atomic(path, &tensors, &metadata)
    }
}

/// Saves a model without training state.
///
/// # Errors
/// [`Error::Failure`] if the file cannot be written.
pub fn save_model(path: &Path, header: &Header, params: &[ParamSpec], weights: &[Vec<f32>]) -> Result<()> {
    save_atomic(path, &named(params, "", weights), &header.metadata()?)
}

/// Reads the model of a safetensors file and, where trencadis wrote it, its description. Training
/// state is skipped.
///
/// # Errors
/// [`Error::Usage`] naming the file, if it is absent or damaged.
pub fn load_model(path: &Path) -> Result<(Option<Header>, Weights)> {
    let weights = Weights::load_where(path, |name| !name.starts_with(TRAINING))?;
    let header = match weights.metadata.contains_key("trencadis") {
        true => Some(Header::read(path, &weights.metadata)?),
        false => None,
    };
    Ok((header, weights))
}

/// Reads the description of a checkpoint and none of its tensors.
///
/// # Errors
/// [`Error::Usage`] naming the file, if it is absent, damaged or not written by trencadis.
pub fn load_header(path: &Path) -> Result<Header> {
    Header::read(path, &Weights::load_metadata(path)?)
}

/// Reads everything that resuming needs.
///
/// # Errors
/// [`Error::Usage`] naming the file, if it is absent, damaged, not written by trencadis, holds no
/// training state, or does not fit `params`.
pub fn load_training(path: &Path, params: &[ParamSpec]) -> Result<(Header, TrainState<'static>)> {
    let mut all = Weights::load(path)?;
    let header = Header::read(path, &all.metadata)?;
    let Some(optimizer_step) = all.metadata.get("optimizer_step") else {
        return Err(Error::file(path, "holds a model without training state; resume from last.safetensors"));
    };
    let optimizer_step = optimizer_step.parse().map_err(|_| damaged(path, "optimizer_step"))?;
    let mut take = |prefix: &str| {
        let chosen: Vec<_> = all.tensors.keys().filter(|name| name.starts_with(prefix)).cloned().collect();
        let mut tensors = BTreeMap::new();
        for name in chosen {
            if let Some(tensor) = all.tensors.remove(&name) {
                tensors.insert(name[prefix.len()..].to_owned(), tensor);
            }
        }
        Weights { tensors, ..Weights::default() }
    };
    let [m, v, raw] = KINDS.map(&mut take);
    let model = take("");
    let fit = |weights| assign(path, weights, params, Policy::Exact).map(|(values, _)| values);
    let model = fit(model)?;
    let (weights, ema) = if raw.tensors.is_empty() { (model, None) } else { (fit(raw)?, Some(model)) };
    let state = TrainState {
        weights: weights.into(),
        ema: ema.map(Into::into),
        m: fit(m)?.into(),
        v: fit(v)?.into(),
        optimizer_step,
    };
    Ok((header, state))
}

impl Header {
    fn metadata(&self) -> Result<BTreeMap<String, String>> {
        let json = |value: serde_json::Result<String>| value.map_err(Error::failure);
        Ok(BTreeMap::from([
            // Other programs expect to be told who lays out tensors this way.
            ("format".into(), "pt".into()),
            ("trencadis".into(), VERSION.into()),
            ("recipe".into(), self.recipe.clone()),
            ("classes".into(), json(serde_json::to_string(&self.classes))?),
            ("progress".into(), json(serde_json::to_string(&self.progress))?),
        ]))
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

fn named<'a>(params: &'a [ParamSpec], prefix: &str, values: &'a [Vec<f32>]) -> Vec<TensorRef<'a>> {
    assert_eq!(params.len(), values.len(), "one tensor a parameter");
    let name = |p: &'a ParamSpec| match prefix {
        "" => Cow::Borrowed(p.name.as_str()),
        _ => Cow::Owned(format!("{prefix}{}", p.name)),
    };
    params.iter().zip(values).map(|(p, data)| TensorRef { name: name(p), shape: &p.shape, data }).collect()
}
