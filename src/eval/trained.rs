//! A trained model that is ready to run: weights, recipe and class names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::device::DeviceModel;
use super::model::{Features, Keep, Model, WithParams};
use super::open::{Opened, Told, open};
use super::towers::{CpuEmbed, CpuTowers, DeviceTowers, Embed};
use super::zero_shot::ZeroShot;
use crate::autograd::device::BatchShape;
use crate::data::packing;
use crate::data::texts::TextSettings;
use crate::data::tokenizer::Tokenizer;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::train::run_dir;
use crate::weights::foreign::fold_prefix;
use crate::weights::{Policy, assign};

/// A checkpoint that is ready to run.
pub struct Trained {
    /// The file it came from.
    pub path: PathBuf,
    /// The recipe it was trained with.
    pub recipe: Recipe,
    /// Class names; a label is an index into them.
    pub classes: Vec<String>,
    /// The forward pass for batches of the recipe's size, with its weights.
    pub model: Box<dyn Features>,
}

impl Trained {
    /// Reads `path`: a checkpoint, a run folder, whose best model (else the last) is taken, or weights of another program
    /// with what is `told` about them. It runs on `device`, where there is one, at up to `resolution` pixels (0: the
    /// recipe's).
    ///
    /// # Errors
    /// Those of [`open`]; a model that does not run on the device.
    pub fn load(path: &Path, told: &Told<'_>, device: Option<&Device>, resolution: usize) -> Result<Self> {
        let shape = |recipe: &Recipe, slots| BatchShape::of_recipe(recipe, slots, resolution);
        Self::load_for(path, told, device, Keep::Logits, shape)
    }

    /// The same where recipe and image slots decide the shape of the batches that a device makes room for, and what can be
    /// read besides the logits.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn load_for(
        path: &Path,
        told: &Told<'_>,
        device: Option<&Device>,
        keep: Keep,
        shape: impl FnOnce(&Recipe, usize) -> BatchShape,
    ) -> Result<Self> {
        let file = run_dir::model_file(path)?;
        let Opened { recipe, classes, mut weights, tokenizer, .. } = open(&file, told)?;
        fold_prefix(&mut weights)?;
        let slots = packing::slots(&recipe);
        if recipe.text.is_on() {
            let tokenizer = match tokenizer {
                Some(json) => Tokenizer::from_json(json).map_err(|why| Error::file(&file, why))?,
                None => Tokenizer::open(&recipe.text.tokenizer)?,
            };
            let texts = TextSettings::new(&recipe, slots, Arc::new(tokenizer));
            let towers = CpuTowers::new(&recipe, recipe.packing.tokens, slots)?;
            let (params, _) = assign(&file, weights, towers.params(), Policy::Exact)?;
            let towers: Box<dyn Embed> = match device {
                None => Box::new(CpuEmbed { towers, params }),
                Some(device) => {
                    let shape = shape(&recipe, slots);
                    Box::new(DeviceTowers::new(device, &recipe, shape, &params)?)
                }
            };
            // One class, which images of no class have, tells nothing.
            let told = if classes.len() > 1 { &classes[..] } else { &[] };
            let model = Box::new(ZeroShot::new(towers, &recipe, texts, told, &recipe.text.prompts)?);
            return Ok(Self { path: file, recipe, classes, model });
        }
        let model = Model::new(&recipe, classes.len(), recipe.packing.tokens, slots, keep)?;
        let (params, _) = assign(&file, weights, model.params(), Policy::Exact)?;
        let model: Box<dyn Features> = match device {
            None => Box::new(WithParams { model, params }),
            Some(device) => {
                let shape = shape(&recipe, slots);
                Box::new(DeviceModel::new(device, &recipe, classes.len(), shape, keep, &params)?)
            }
        };
        Ok(Self { path: file, recipe, classes, model })
    }

    /// Refuses a model of texts that knows no classes, since its data had none.
    ///
    /// # Errors
    /// One sentence that says how to tell it some.
    pub fn require_classes(&self) -> Result<()> {
        match self.model.classes() {
            0 => Err(Error::file(
                &self.path,
                "the data that the model was trained on had no classes; evaluate it on data that have some: trencadis eval \
                 MODEL --suite zero-shot --data PATH",
            )),
            _ => Ok(()),
        }
    }
}
