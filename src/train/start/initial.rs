//! Weights of a file that a run starts from.

use std::path::Path;

use crate::autograd::ParamSpec;
use crate::autograd::graph::TEXT_PREFIX;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::models::two_tower::{BIAS, SCALE};
use crate::nn::init::initial;
use crate::recipe::Recipe;
use crate::train::checkpoint;
use crate::train::run_dir::model_file;
use crate::train::step::TrainStep;
use crate::weights::{Policy, Weights, assign, foreign, resize};

/// What a new run knows.
#[derive(Clone, Copy)]
pub(super) struct Known<'a> {
    /// Classes of its data.
    pub classes: &'a [String],
    /// Tokenizer of its texts.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// The weights in `path`, a file or the folder of a run, as parameters of `step`, with notes on what was done to them.
///
/// # Errors
/// Weights of another model, or of one with another tokenizer.
pub(super) fn initial_weights(
    path: &Path,
    recipe: &Recipe,
    known: Known<'_>,
    step: &TrainStep,
    notes: &mut Vec<String>,
) -> Result<Vec<Vec<f32>>> {
    let path = &model_file(path)?;
    let (header, mut weights) = checkpoint::load_model(path)?;
    if let (Some(ours), Some(theirs)) =
        (known.tokenizer, header.as_ref().and_then(|header| header.tokenizer.as_deref()))
        && !is_same(ours.json(), theirs)
    {
        return Err(Error::file(
            path,
            format!(
                "the text tower was trained with another tokenizer than text.tokenizer = \"{}\", whose tokens have other \
                 numbers; set text.tokenizer to the one it was trained with",
                recipe.text.tokenizer
            ),
        ));
    }
    let left_out = !recipe.text.is_on() && drop_texts(&mut weights);
    let converted = if let Some(header) = header {
        let mut described = Recipe::from_toml(&header.recipe, path)?.model;
        if header.classes != known.classes {
            // As many classes as before, perhaps, but other ones.
            let heads: Vec<&str> = step.params().iter().filter(|p| p.head).map(|p| p.name.as_str()).collect();
            weights.tensors.retain(|name, _| !heads.contains(&name.as_str()));
        }
        foreign::detect_and_convert(weights, &mut described).map(|weights| (weights, described))
    } else {
        foreign::initial(weights, &recipe.model)
    };
    let (mut weights, mut described) = converted.map_err(|e| Error::file(path, e))?;
    let resized =
        resize::fit(&mut weights, &mut described, &recipe.model).map_err(|e| Error::file(path, e))?;
    let mut differences = described.differences(&recipe.model)?;
    if !differences.is_empty() {
        let (there, here) = (described.dimensions()?, recipe.model.dimensions()?);
        for (key, there, here) in [
            ("width", there.width, here.width),
            ("depth", there.depth, here.depth),
            ("mlp", there.mlp, here.mlp),
        ] {
            if there != here {
                differences.insert(0, format!("model.{key} is {there} there and {here} here"));
            }
        }
        return Err(Error::file(
            path,
            format!(
                "was made by another model: {}; give the recipe the same values, with --set or in a file of your own",
                differences.join(", ")
            ),
        ));
    }
    let policy = Policy::NewHead { seed: recipe.train.seed };
    let drawn = match recipe.text.is_on() {
        true => suit_texts(&mut weights, step.params(), recipe.train.seed),
        false => Vec::new(),
    };
    let (params, report) = assign(path, weights, step.params(), policy)?;
    notes.push(format!("start             {} tensors from {}", report.taken, path.display()));
    if left_out {
        notes.push("left out          the text tower, and what scores are made with".into());
    }
    notes.extend(drawn);
    notes.extend(resized.map(|resized| format!("resized           {resized}")));
    if !report.fresh.is_empty() {
        notes.push(format!("fresh             {}", report.fresh.join(", ")));
    }
    Ok(params)
}

/// Whether two descriptions of a tokenizer say the same, however they are written.
fn is_same(ours: &str, theirs: &str) -> bool {
    let read = |json: &str| serde_json::from_str::<serde_json::Value>(json).ok();
    ours == theirs || read(ours).is_some_and(|ours| read(theirs) == Some(ours))
}

/// Leaves out the text tower for a run on classes; whether there was one.
fn drop_texts(weights: &mut Weights) -> bool {
    let before = weights.tensors.len();
    weights.tensors.retain(|name, _| !is_of_texts(name));
    weights.tensors.len() < before
}

fn is_of_texts(name: &str) -> bool {
    name.starts_with(TEXT_PREFIX) || [SCALE, BIAS].contains(&name)
}

/// Leaves out the head of a model of classes, and what the loss has no use for, and draws what `weights` lack: all that is
/// of texts where they are those of an image tower alone, else the bias that another loss had not. Notes say so.
fn suit_texts(weights: &mut Weights, params: &[ParamSpec], seed: u64) -> Vec<String> {
    weights.tensors.retain(|name, _| !name.starts_with("head."));
    let mut notes = Vec::new();
    if !params.iter().any(|param| param.name == BIAS) && weights.tensors.remove(BIAS).is_some() {
        notes.push(format!("left out          {BIAS}, which contrastive.loss does not have"));
    }
    let alone = !weights.tensors.keys().any(|name| name.starts_with(TEXT_PREFIX));
    let lacks = |param: &&ParamSpec| match alone {
        true => is_of_texts(&param.name),
        false => param.name == BIAS && !weights.tensors.contains_key(BIAS),
    };
    let drawn: Vec<&ParamSpec> = params.iter().filter(lacks).collect();
    match (alone, drawn.is_empty()) {
        (true, _) => notes.push("fresh             the text tower, and what scores are made with".into()),
        (false, false) => notes.push(format!("fresh             {BIAS}")),
        (false, true) => {}
    }
    for param in drawn {
        weights.tensors.insert(param.name.clone(), (param.shape.clone(), initial(param, seed)));
    }
    notes
}
