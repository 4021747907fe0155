//! A teacher's network, over the batches of a student.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::autograd::ParamSpec;
use crate::autograd::device::BatchShape;
use crate::data::batch::PackedBatch;
use crate::data::positions::longest_axis;
use crate::data::resolution::{self, Limits};
use crate::data::settings::{PackingSettings, has_absolute_table, position_limits, slots};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::device::DeviceModel;
use crate::eval::model::{Forward, Keep, Model, WithParams};
use crate::eval::open::{Opened, Told, open};
use crate::kernels::view::Views;
use crate::recipe::{AspectKind, DataConfig, Recipe};
use crate::weights::foreign::fold_prefix;
use crate::weights::{Policy, assign, fingerprint};

/// A model that sees the batches of another.
pub struct Network {
    file: PathBuf,
    model: Box<dyn Forward>,
    parameters: usize,
    /// Of some of its weights.
    pub fingerprint: u64,
    /// Prefix tokens of the student and of the teacher, and the teacher's token budget, where these differ.
    prefix: Option<[usize; 3]>,
}

impl Network {
    /// Opens `file` for batches of the student, on `device` where there is one, and tells which classes it knows.
    ///
    /// # Errors
    /// A file that cannot be opened as a model; one that cannot see the student's batches; a model that does not run on
    /// the device.
    pub fn open(student: &Recipe, file: &Path, device: Option<&Device>) -> Result<(Self, Vec<String>)> {
        let Opened { recipe: teacher, classes: known, mut weights, .. } = open(file, &Told::default())?;
        if teacher.text.is_on() {
            return Err(Error::file(
                file,
                "was trained on texts, and a teacher tells classes; take a model that was trained on them",
            ));
        }
        fold_prefix(&mut weights)?;
        check_batches(student, &teacher).map_err(|cause| Error::file(file, cause))?;
        // It runs over the student's batches, whose pixels it normalises as it is used to.
        let recipe = Recipe {
            model: teacher.model,
            data: DataConfig { mean: teacher.data.mean, std: teacher.data.std, ..student.data.clone() },
            ..student.clone()
        };
        let (slots, here, there) = (slots(student), student.model.prefix(), recipe.model.prefix());
        let tokens = match there > here {
            true => (student.packing.tokens + slots * (there - here)).next_multiple_of(128),
            false => student.packing.tokens,
        };
        let prefix = (here != there).then_some([here, there, tokens]);
        let model = Model::new(&recipe, known.len(), tokens, slots, Keep::Logits)?;
        let parameters = model.params().iter().map(ParamSpec::len).sum();
        let (params, _) = assign(file, weights, model.params(), Policy::Exact)?;
        let fingerprint = fingerprint(&params);
        let model: Box<dyn Forward> = match device {
            None => Box::new(WithParams { model, params }),
            Some(device) => {
                let resolution = student.resolution.max.max(student.eval.resolution);
                let shape = BatchShape { soft_classes: None, ..BatchShape::of_training(student, 0, slots) };
                let shape = BatchShape {
                    tokens,
                    views: shape.views.map(|views| Views { tokens, ..views }),
                    image_rows: shape.image_rows - here + there,
                    longest: longest_axis(&recipe.model.position, resolution, recipe.model.patch),
                    ..shape
                };
                Box::new(DeviceModel::new(device, &recipe, known.len(), shape, Keep::Logits, &params)?)
            }
        };
        Ok((Self { file: file.into(), model, parameters, fingerprint, prefix }, known))
    }

    /// `[N, classes]` for a batch of the student, whose targets are class indices.
    ///
    /// # Errors
    /// A failed device; an image too slender for its positions.
    pub fn logits(&mut self, batch: &PackedBatch) -> Result<&[f32]> {
        let own = self.prefix.map(|[from, to, tokens]| batch.with_prefix(from, to, tokens));
        self.model.logits(own.as_ref().unwrap_or(batch))
    }

    /// A network that sees batches as they are.
    #[cfg(test)]
    pub fn of(model: Box<dyn Forward>) -> Self {
        Self { file: "teacher.safetensors".into(), model, parameters: 0, fingerprint: 0, prefix: None }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {:.2} M parameters", self.file.display(), self.parameters as f64 / 1e6)
    }
}

/// Whether a teacher can see the batches of a student as they are.
fn check_batches(student: &Recipe, teacher: &Recipe) -> Result<()> {
    let (there, here) = (&teacher.model, &student.model);
    for (key, there, here) in
        [("model.patch", there.patch, here.patch), ("model.channels", there.channels, here.channels)]
    {
        if there != here {
            return Err(Error::usage(format!(
                "{key} is {there} there and {here} in the student; a teacher sees the student's batches, so give both \
                 the same"
            )));
        }
    }
    let settings = PackingSettings::train(student)?;
    let sizes = &settings.resolution;
    let largest = match sizes.aspect {
        AspectKind::Native => settings.limits,
        AspectKind::Square => {
            let square = (1 << 16, 1 << 16);
            let grid =
                resolution::target(sizes, settings.patch, settings.limits, square, sizes.max as f64).grid;
            Limits { patches: grid.patches(), rows: grid.rows, cols: grid.cols }
        }
    };
    let known = position_limits(&there.position, sizes.max, settings.patch);
    let table = |limits: Limits| limits.patches.min(limits.rows.saturating_mul(limits.cols));
    let fits = largest.rows <= known.rows && largest.cols <= known.cols && table(largest) <= known.patches;
    if fits || !has_absolute_table(&there.position) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "has absolute positions for model.position.rows = {} and model.position.columns = {}, and an image of the \
         student may have more; lower resolution.max, or set resolution.aspect = \"square\"",
        there.position.rows, there.position.columns
    )))
}
