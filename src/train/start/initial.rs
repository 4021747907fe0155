//! Weights of a file that a run starts from.

use std::path::Path;

use crate::autograd::ParamSpec;
use crate::autograd::graph::TEXT_PREFIX;
use crate::error::{Error, Result};
use crate::models::two_tower::{BIAS, SCALE};
use crate::nn::init::initial;
use crate::recipe::Recipe;
use crate::train::checkpoint;
use crate::train::run_dir::model_file;
use crate::train::step::TrainStep;
use crate::weights::{Policy, Weights, assign, foreign, resize};

/// The weights in `path`, a file or the folder of a run, as parameters of `step`, with notes on what was done to them.
///
/// # Errors
/// Weights of another model.
pub(super) fn initial_weights(
    path: &Path,
    recipe: &Recipe,
    classes: &[String],
    step: &TrainStep,
    notes: &mut Vec<String>,
) -> Result<Vec<Vec<f32>>> {
    let path = &model_file(path)?;
    let (header, mut weights) = checkpoint::load_model(path)?;
    let converted = if let Some(header) = header {
        let mut described = Recipe::from_toml(&header.recipe, path)?.model;
        if header.classes != classes {
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
        true => draw_texts(&mut weights, step.params(), recipe.train.seed),
        false => None,
    };
    let (params, report) = assign(path, weights, step.params(), policy)?;
    notes.push(format!("start             {} tensors from {}", report.taken, path.display()));
    notes.extend(drawn.map(|drawn| format!("fresh             {drawn}")));
    notes.extend(resized.map(|resized| format!("resized           {resized}")));
    if !report.fresh.is_empty() {
        notes.push(format!("fresh             {}", report.fresh.join(", ")));
    }
    Ok(params)
}

/// Leaves out the head of a model of classes, and draws what `weights` lack where they are those of an image tower alone;
/// says so.
fn draw_texts(weights: &mut Weights, params: &[ParamSpec], seed: u64) -> Option<String> {
    weights.tensors.retain(|name, _| !name.starts_with("head."));
    let alone = !weights.tensors.keys().any(|name| name.starts_with(TEXT_PREFIX));
    if !alone {
        return None;
    }
    let others = params
        .iter()
        .filter(|param| param.name.starts_with(TEXT_PREFIX) || [SCALE, BIAS].contains(&param.name.as_str()));
    for param in others {
        weights.tensors.insert(param.name.clone(), (param.shape.clone(), initial(param, seed)));
    }
    Some("the text tower, and what scores are made with".into())
}
