//! What all batches of a run have in common: what memory on a device is made for.

use crate::data::batch::{Modality, PREFIX, PackedBatch, Patches, Pictures, Targets};
use crate::data::pictures::views;
use crate::data::positions;
use crate::data::settings::PackingSettings;
use crate::error::{Error, Result};
use crate::kernels::view::Views;
use crate::recipe::{Recipe, ViewsKind};

/// What all batches of a run have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShape {
    /// Token rows T.
    pub tokens: usize,
    /// Image slots N.
    pub slots: usize,
    /// Values of a patch.
    pub patch_dim: usize,
    /// Whether patches are f32 values and not u8 pixels.
    pub wide_patches: bool,
    /// Classes of soft targets, mixtures among them; none where targets are class indices.
    pub soft_classes: Option<usize>,
    /// Most token rows of an image.
    pub image_rows: usize,
    /// Most patches of an image along an axis: what position tables are resampled to.
    pub longest: usize,
    /// The texts of the slots, where there are any.
    pub texts: Option<TextShape>,
    /// Pictures, where the device makes the patches.
    pub views: Option<Views>,
}

/// What all texts of a run have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextShape {
    /// Token rows.
    pub tokens: usize,
    /// Most tokens of a text.
    pub rows: usize,
}

impl BatchShape {
    /// The batches that the loader makes for `recipe`, in its evaluations and in others at up to `resolution` pixels,
    /// and, where their targets are class indices, in training.
    pub fn of_recipe(recipe: &Recipe, slots: usize, resolution: usize) -> Self {
        let resolution = resolution.max(recipe.resolution.max).max(recipe.eval.resolution);
        let tokens = recipe.packing.tokens;
        let settings = [PackingSettings::train(recipe), PackingSettings::eval(recipe, resolution)];
        let rows = |settings: Result<PackingSettings>| settings.map_or(tokens, |settings| settings.longest());
        Self {
            tokens,
            slots,
            patch_dim: recipe.model.patch_dim(),
            wide_patches: false,
            soft_classes: None,
            image_rows: settings.map(rows).into_iter().fold(1, usize::max),
            longest: positions::longest_axis(&recipe.model.position, resolution, recipe.model.patch),
            texts: recipe
                .text
                .is_on()
                .then(|| TextShape { tokens: recipe.text_tokens(slots), rows: recipe.text.max_tokens }),
            views: None,
        }
    }

    /// The same in training, where targets may be soft and patches made by the device.
    pub fn of_training(recipe: &Recipe, classes: usize, slots: usize) -> Self {
        let soft = recipe.mix.is_on() || recipe.distill.is_on();
        Self {
            soft_classes: soft.then_some(classes),
            views: (recipe.data.views == ViewsKind::Device).then(|| views(recipe, slots)),
            ..Self::of_recipe(recipe, slots, 0)
        }
    }

    /// The shape of `batch`, of whose mixtures nobody knows out of how many classes:
    /// [`DeviceBatch::write`](super::batch::DeviceBatch::write) takes them where soft targets have a place.
    pub fn of(batch: &PackedBatch) -> Self {
        let slots = batch.slots();
        Self {
            tokens: batch.tokens(),
            slots,
            patch_dim: batch.patch_dim,
            wide_patches: matches!(batch.patches, Patches::F32(_)),
            soft_classes: match &batch.targets {
                Targets::Classes(_) | Targets::Mixed(_) => None,
                Targets::Soft(targets) => Some(targets.len() / slots.max(1)),
            },
            image_rows: image_rows(batch).max(1),
            longest: longest(batch).max(1),
            texts: batch
                .texts
                .as_ref()
                .map(|texts| TextShape { tokens: texts.tokens(), rows: image_rows(texts).max(1) }),
            views: match &batch.patches {
                Patches::Pictures(Pictures { shape, .. }) => Some(*shape),
                Patches::U8(_) | Patches::F32(_) => None,
            },
        }
    }

    /// The shape of the images, or of the texts as a batch of their own.
    ///
    /// # Errors
    /// Texts are asked for and there are none.
    pub fn of_modality(self, modality: Modality) -> Result<Self> {
        match (modality, self.texts) {
            (Modality::Images, _) => Ok(self),
            (Modality::Texts, Some(TextShape { tokens, rows })) => Ok(Self {
                tokens,
                patch_dim: 0,
                wide_patches: false,
                soft_classes: None,
                image_rows: rows,
                // Ids are absolute positions: nothing is resampled.
                longest: usize::from(PREFIX[0]) - 1,
                texts: None,
                views: None,
                ..self
            }),
            (Modality::Texts, None) => {
                Err(Error::failure("the model has a text tower, and its batches are without texts"))
            }
        }
    }
}

pub(super) fn longest(batch: &PackedBatch) -> usize {
    batch.grids.iter().flatten().copied().max().map_or(0, usize::from)
}

pub(super) fn image_rows(batch: &PackedBatch) -> usize {
    batch.cu_seqlens.windows(2).map(|pair| pair[1].saturating_sub(pair[0]).max(0) as usize).max().unwrap_or(0)
}
