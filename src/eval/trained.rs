//! A trained model that is ready to run: weights, recipe and class names.

use std::path::{Path, PathBuf};

use super::device::DeviceModel;
use super::model::{Keep, Model, Observed, WithParams};
use super::open::{Opened, Told, open};
use crate::autograd::device::BatchShape;
use crate::data::packing;
use crate::device::Device;
use crate::error::Result;
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
    pub model: Box<dyn Observed>,
}

impl Trained {
    /// Reads `path`: a checkpoint, a run folder, whose best model (else the last) is taken, or weights of another program
    /// with what is `told` about them. It runs on `device`, where there is one, at up to `resolution` pixels (0: the
    /// recipe's).
    ///
    /// # Errors
    /// Those of [`open`]; a model that does not run on the device.
    pub fn load(path: &Path, told: &Told<'_>, device: Option<&Device>, resolution: usize) -> Result<Self> {
        Self::load_for(path, told, device, Keep::Logits, |_| resolution)
    }

    /// The same where the recipe decides up to how many pixels, and what can be read besides the logits.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn load_for(
        path: &Path,
        told: &Told<'_>,
        device: Option<&Device>,
        keep: Keep,
        resolution: impl FnOnce(&Recipe) -> usize,
    ) -> Result<Self> {
        let file = run_dir::model_file(path)?;
        let Opened { recipe, classes, mut weights, .. } = open(&file, told)?;
        fold_prefix(&mut weights)?;
        let slots = packing::slots(&recipe);
        let model = Model::new(&recipe, classes.len(), recipe.packing.tokens, slots, keep)?;
        let (params, _) = assign(&file, weights, model.params(), Policy::Exact)?;
        let model: Box<dyn Observed> = match device {
            None => Box::new(WithParams { model, params }),
            Some(device) => {
                let shape = BatchShape::of_recipe(&recipe, slots, resolution(&recipe));
                Box::new(DeviceModel::new(device, &recipe, classes.len(), shape, keep, &params)?)
            }
        };
        Ok(Self { path: file, recipe, classes, model })
    }
}
