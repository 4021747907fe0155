//! Any file of weights as a model: a checkpoint, which describes itself, or weights of another program with what is
//! known of them.

use std::path::Path;

use super::model::{Keep, Model};
use super::towers::CpuTowers;
use crate::error::{Error, Result};
use crate::recipe::{AspectKind, ModelConfig, PackingKind, PoolKind, Recipe, ResolutionKind};
use crate::train::checkpoint::{self, Header, Progress};
use crate::weights::foreign::arch::Arch;
use crate::weights::foreign::{self, PREFIX_POSITIONS};
use crate::weights::{Weights, check_fit};

/// Metadata: the table of names that converted weights had.
pub const ORIGIN: &str = "origin";
/// Tokens of a batch of a model that comes without a recipe, at least.
const TOKENS: usize = 4096;

/// What is said about weights besides their file.
#[derive(Clone, Debug, Default)]
pub struct Told<'a> {
    /// A published architecture.
    pub arch: Option<&'a str>,
    /// A recipe, by name or path.
    pub config: Option<&'a str>,
    /// Settings, `key=value`, that go before all others.
    pub sets: &'a [String],
    /// Class names; those of the file, or numbers, where there are none.
    pub classes: Option<Vec<String>>,
}

/// A model with its description.
#[derive(Clone, Debug)]
pub struct Opened {
    /// Everything that is known of the model.
    pub recipe: Recipe,
    /// Class names.
    pub classes: Vec<String>,
    /// Weights under our names, positions of prefix tokens apart ([`foreign::fold_prefix`]).
    pub weights: Weights,
    /// The table of the names that they had; none for our own.
    pub origin: Option<String>,
    /// The implementation, for people; empty for our own.
    pub implementation: &'static str,
    /// How texts become tokens, of a model of texts: a `tokenizer.json`.
    pub tokenizer: Option<String>,
    /// Whether the file did not describe itself, and settings had to be taken from elsewhere.
    pub foreign: bool,
}

/// Reads `path` and finds out what it is.
///
/// # Errors
/// [`Error::Usage`] naming the file: damaged, of no known implementation, tensors that are missing, unexpected, of another
/// shape or no numbers, settings that must be given, a description that does not fit.
pub fn open(path: &Path, told: &Told<'_>) -> Result<Opened> {
    let at = |cause: Error| match cause {
        Error::Usage(message) => Error::file(path, message),
        other => other,
    };
    let (header, weights) = checkpoint::load_model(path)?;
    let sets = if header.is_some() { told.sets } else { &[] };
    let given = told.config.map(|config| Recipe::load(config, sets)).transpose()?;
    let opened = match header {
        Some(header) => described(path, header, weights, told, given)?,
        None => of_names(weights, told, given).map_err(at)?,
    };
    check(path, &opened)?;
    Ok(opened)
}

/// A checkpoint.
fn described(
    path: &Path,
    header: Header,
    weights: Weights,
    told: &Told<'_>,
    given: Option<Recipe>,
) -> Result<Opened> {
    if let Some(arch) = told.arch {
        return Err(Error::file(path, format_args!("describes its model itself; leave --arch {arch} out")));
    }
    let recipe = match given {
        Some(recipe) => recipe,
        None => Recipe::from_toml(&header.recipe, path)?.with_sets(told.sets)?,
    };
    recipe.validate()?;
    let classes = match &told.classes {
        None => header.classes,
        Some(given) if given.len() == header.classes.len() => given.clone(),
        Some(given) => return Err(Error::file(path, too_many(given.len(), header.classes.len()))),
    };
    let origin = weights.metadata.get(ORIGIN).cloned();
    let mut model = recipe.model.clone();
    let converted = foreign::convert(weights, &mut model).map_err(|cause| Error::file(path, cause))?;
    Ok(Opened {
        recipe,
        classes,
        weights: converted.weights,
        origin,
        implementation: "",
        tokenizer: header.tokenizer,
        foreign: false,
    })
}

/// Weights alone.
fn of_names(weights: Weights, told: &Told<'_>, given: Option<Recipe>) -> Result<Opened> {
    let arch = told.arch.map(Arch::named).transpose()?;
    let mut recipe = match given {
        Some(recipe) => recipe,
        None if weights.tensors.contains_key("patch_embed.weight") => {
            return Err(Error::usage(
                "has the names of this program and no description; give the recipe it was trained with (--config)",
            ));
        }
        None => {
            let mut model = ModelConfig { shape: String::new(), ..ModelConfig::default() };
            // Told by the file, or as it is usual for its patch.
            (model.position.rows, model.position.columns) = (0, 0);
            let unshaped = Recipe { model, ..Recipe::default() };
            unshaped.with_sets(foreign::usual_settings(&weights)?)?
        }
    };
    if let Some(arch) = &arch {
        recipe = recipe.with_sets(&arch.settings())?;
    }
    recipe = recipe.with_sets(told.sets)?;
    let converted = foreign::convert(weights, &mut recipe.model)?;
    // What shapes tell stays; a setting that contradicts them is found below.
    recipe = recipe.with_sets(told.sets)?;
    if let (Some(arch), Some(table)) = (&arch, converted.origin) {
        arch.check(table, converted.name, &recipe.model.dimensions()?)?;
    }
    recipe.model.validate()?;
    // A recipe that says nothing of batches has none that hold an image of another patch.
    if told.config.is_none() || recipe.validate().is_err() {
        let side = arch
            .map_or(recipe.model.position.rows.saturating_mul(recipe.model.patch), |arch| arch.resolution);
        suit(&mut recipe, side, told.sets)?;
    }
    recipe.validate()?;
    let count = match converted.weights.tensors.get("head.weight") {
        Some((shape, _)) if shape.len() == 2 => shape[0],
        _ => return Err(Error::usage("the weights have no head.weight [classes, width]")),
    };
    let classes = match &told.classes {
        None => (0..count).map(|class| class.to_string()).collect(),
        Some(given) if given.len() == count => given.clone(),
        Some(given) => return Err(too_many(given.len(), count)),
    };
    Ok(Opened {
        recipe,
        classes,
        weights: converted.weights,
        origin: converted.origin.map(str::to_owned),
        implementation: converted.name,
        tokenizer: None,
        foreign: true,
    })
}

fn too_many(given: usize, count: usize) -> Error {
    Error::usage(format_args!("has {count} classes, and the file of --classes names {given}"))
}

/// Resolution and batches for a model that comes without a recipe: images of `side` pixels, squares for networks that
/// have seen nothing else.
fn suit(recipe: &mut Recipe, side: usize, sets: &[String]) -> Result<()> {
    let model = &recipe.model;
    let side = side.min(1 << 12).max(model.patch);
    let native = model.pool == PoolKind::Map || !model.class_token;
    recipe.resolution.kind = ResolutionKind::Fixed;
    (recipe.resolution.min, recipe.resolution.max) = (side, side);
    recipe.resolution.aspect = if native { AspectKind::Native } else { AspectKind::Square };
    recipe.packing.kind = PackingKind::Flat;
    let image = (side / model.patch).pow(2) + model.prefix();
    recipe.packing.tokens = (2 * image).max(TOKENS).next_multiple_of(128);
    if model.channels == 1 && recipe.data.mean.len() == 3 {
        (recipe.data.mean, recipe.data.std) = (vec![0.5], vec![0.5]);
    }
    *recipe = recipe.with_sets(sets)?;
    Ok(())
}

/// Whether the weights are those of the model that the recipe describes.
fn check(path: &Path, opened: &Opened) -> Result<()> {
    let (recipe, classes) = (&opened.recipe, opened.classes.len());
    let params = match recipe.text.is_on() {
        true => CpuTowers::new(recipe, 128, 1)?.params().to_vec(),
        false => Model::new(recipe, classes, 128, 1, Keep::Logits)?.params().to_vec(),
    };
    let found = opened.weights.tensors.iter().map(|(name, (shape, _))| (name.as_str(), shape.as_slice()));
    let found = found.filter(|(name, _)| *name != PREFIX_POSITIONS).collect();
    check_fit(path, &found, params.iter())
}

impl Opened {
    /// The file of a model that describes itself.
    ///
    /// # Errors
    /// Never for a recipe that was loaded.
    pub fn into_checkpoint(self) -> Result<Weights> {
        let header = Header {
            recipe: self.recipe.to_toml()?,
            classes: self.classes,
            tokenizer: self.tokenizer,
            progress: Progress::default(),
        };
        let mut metadata = header.metadata()?;
        metadata.extend(self.origin.map(|origin| (ORIGIN.to_owned(), origin)));
        Ok(Weights { tensors: self.weights.tensors, metadata })
    }
}
