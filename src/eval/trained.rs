//! A trained model as it stands in a checkpoint: weights, recipe and class names in one file.

use std::path::{Path, PathBuf};

use super::device::DeviceModel;
use super::model::{Forward, Model, WithParams};
use crate::autograd::device::BatchShape;
use crate::data::packing;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::train::{checkpoint, run_dir};
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
    pub model: Box<dyn Forward>,
}

impl Trained {
    /// Reads `path`: a checkpoint, or a run folder, whose best model (else the last) is taken. It runs on `device`,
    /// where there is one, at up to `resolution` pixels (0: the recipe's).
    ///
    /// # Errors
    /// If there is no checkpoint, or the file is one of another program; a model that does not run on the device.
    pub fn load(path: &Path, device: Option<&Device>, resolution: usize) -> Result<Self> {
        let file = run_dir::model_file(path)?;
        let (header, weights) = checkpoint::load_model(&file)?;
        let Some(header) = header else {
            return Err(Error::file(
                &file,
                "holds no recipe and class names, so it is no trencadis checkpoint; weights of other programs go \
                 through `trencadis train RECIPE --init` or `trencadis forward`",
            ));
        };
        let recipe = Recipe::from_toml(&header.recipe, &file)?;
        let classes = header.classes;
        let slots = packing::slots(&recipe);
        let model = Model::new(&recipe, classes.len(), recipe.packing.tokens, slots, false)?;
        let (params, _) = assign(&file, weights, model.params(), Policy::Exact)?;
        let model: Box<dyn Forward> = match device {
            None => Box::new(WithParams { model, params }),
            Some(device) => {
                let shape = BatchShape::of_recipe(&recipe, slots, resolution);
                Box::new(DeviceModel::new(device, &recipe, classes.len(), shape, false, &params)?)
            }
        };
        Ok(Self { path: file, recipe, classes, model })
    }
}
