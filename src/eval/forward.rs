//! Raw images through a model, packed together: the door for anyone who compares numbers with
//! another implementation or feeds another model.

use std::collections::BTreeMap;
use std::path::Path;

use super::device::DeviceModel;
use super::model::{Forward, Keep, Model};
use crate::autograd::device::BatchShape;
use crate::data::batch::{PREFIX, PackedBatch, Patches, Targets};
use crate::data::positions;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::recipe::{ModelConfig, Recipe};
use crate::weights::{Policy, Weights, assign, foreign};

/// Patches a side may have: positions are u16, and the largest marks prefix tokens.
const MAX_SIDE: usize = 65_534;

/// Results for all images, in their order.
#[derive(Clone, Debug)]
pub struct ForwardOutput {
    /// Number of classes K.
    pub classes: usize,
    /// Model width D.
    pub width: usize,
    /// `[images, K]`.
    pub logits: Vec<f32>,
    /// `[images, D]`, what the head sees.
    pub features: Vec<f32>,
    /// `[n_i, D]` for each image, prefix tokens first.
    pub tokens: Vec<Vec<f32>>,
}

/// An image as it is, no preprocessing: shape `[C, H, W]` and values.
pub type RawImage = (Vec<usize>, Vec<f32>);

/// Runs `images` through the model of `recipe` with `weights` (ours, or any layout that
/// [`foreign`] knows), on `device` where there is one.
///
/// # Errors
/// A weight or image whose shape does not fit; a model of texts; a model that the device has no kernels for.
pub fn run(
    weights: Weights,
    recipe: &Recipe,
    images: &[RawImage],
    device: Option<&Device>,
) -> Result<ForwardOutput> {
    if images.is_empty() {
        return Err(Error::usage("no image to run: the input needs image.0, image.1, ..."));
    }
    if recipe.text.is_on() {
        return Err(Error::usage(
            "the model was trained on texts and has no head; forward runs models that were trained on classes, so evaluate this \
             one with trencadis eval",
        ));
    }
    let mut recipe = recipe.clone();
    let weights = foreign::detect_and_convert(weights, &mut recipe.model)?;
    recipe.model.validate()?;
    let classes = match weights.tensors.get("head.weight") {
        Some((shape, _)) if shape.len() == 2 => shape[0],
        _ => return Err(Error::usage("the weights have no head.weight [classes, width]")),
    };
    let batch = pack(&recipe.model, images)?;
    positions::check(&batch, &recipe.model.position)?;
    let mut model = Model::new(&recipe, classes, batch.tokens(), batch.slots(), Keep::Features)?;
    let (params, _) = assign(Path::new("the weights"), weights, model.params(), Policy::Exact)?;
    let (logits, features, all_tokens) = match device {
        None => {
            let logits = model.run(&params, &batch).to_vec();
            (logits, model.features().to_vec(), model.tokens().to_vec())
        }
        Some(device) => {
            let shape = BatchShape::of(&batch);
            let mut model = DeviceModel::new(device, &recipe, classes, shape, Keep::Features, &params)?;
            let logits = model.logits(&batch)?.to_vec();
            (logits, model.features()?, model.tokens()?)
        }
    };
    let width = features.len() / images.len();
    let rows = |i| {
        let range = batch.range(i);
        all_tokens[range.start * width..range.end * width].to_vec()
    };
    let tokens = (0..images.len()).map(rows).collect();
    Ok(ForwardOutput { classes, width, logits, features, tokens })
}

/// Lays the images' patches one after another.
fn pack(config: &ModelConfig, images: &[RawImage]) -> Result<PackedBatch> {
    let (patch, prefix) = (config.patch, config.prefix());
    let mut values = Vec::new();
    let mut positions = Vec::new();
    let mut cu_seqlens = vec![0];
    let mut grids = Vec::new();
    for (i, (shape, pixels)) in images.iter().enumerate() {
        let &[channels, height, width] = shape.as_slice() else {
            return Err(Error::usage(format!("image.{i} has shape {shape:?}; expected [C, H, W]")));
        };
        let fits = channels == config.channels && height % patch == 0 && width % patch == 0;
        if !fits || height == 0 || width == 0 {
            return Err(Error::usage(format!(
                "image.{i} has shape {shape:?}; expected {} channels and sides that are multiples of the patch, {patch}",
                config.channels
            )));
        }
        let (rows, columns) = (height / patch, width / patch);
        if rows.max(columns) > MAX_SIDE {
            return Err(Error::usage(format!(
                "image.{i} has {rows}x{columns} patches; a side may have at most {MAX_SIDE}"
            )));
        }
        positions.extend(std::iter::repeat_n(PREFIX, prefix));
        values.resize(values.len() + prefix * config.patch_dim(), 0.0);
        for row in 0..rows {
            for column in 0..columns {
                positions.push([row as u16, column as u16]);
                for c in 0..channels {
                    for y in row * patch..(row + 1) * patch {
                        let start = (c * height + y) * width + column * patch;
                        values.extend_from_slice(&pixels[start..start + patch]);
                    }
                }
            }
        }
        cu_seqlens.push(positions.len() as i32);
        grids.push([rows as u16, columns as u16]);
    }
    let tokens = positions.len().next_multiple_of(128);
    if i32::try_from(tokens).is_err() {
        return Err(Error::usage(format!("the images have {tokens} tokens together; run fewer at a time")));
    }
    positions.resize(tokens, [0, 0]);
    values.resize(tokens * config.patch_dim(), 0.0);
    let slots = images.len();
    Ok(PackedBatch {
        patches: Patches::F32(values),
        patch_dim: config.patch_dim(),
        cu_seqlens,
        positions,
        grids,
        targets: Targets::Classes(vec![0; slots]),
        weights: vec![0.0; slots],
        sample_ids: (0..slots as u64).collect(),
        epochs: vec![0; slots],
        images: slots,
        texts: None,
    })
}

/// Picks `image.0`, `image.1`, … out of named tensors.
///
/// # Errors
/// A gap in the numbering, or a tensor that is no image.
pub fn images_of(tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) -> Result<Vec<RawImage>> {
    let mut images = Vec::with_capacity(tensors.len());
    for i in 0..tensors.len() {
        match tensors.get(&format!("image.{i}")) {
            Some(image) => images.push(image.clone()),
            None => {
                return Err(Error::usage(format!(
                    "the input holds {} tensors but no image.{i}; expected image.0 to image.{}",
                    tensors.len(),
                    tensors.len() - 1
                )));
            }
        }
    }
    Ok(images)
}
