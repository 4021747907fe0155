//! Memory of a rank by what it is for.

use serde::Serialize;

use crate::data::batch::Mixture;
use crate::data::pictures::views;
use crate::kernels::view::Record;
use crate::recipe::Recipe;

/// Bytes that a rank holds when it holds the most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RankMemory {
    /// Its pieces of the weights that the optimiser changes, and of their copies in bf16.
    pub weights: usize,
    /// Its pieces of the moments.
    pub moments: usize,
    /// Its pieces of the moving average.
    pub average: usize,
    /// Its pieces of the gradients.
    pub gradients: usize,
    /// Weights of units that are gathered.
    pub gathered: usize,
    /// Gradients of units that are not summed yet.
    pub unit_gradients: usize,
    /// Activations of a training batch.
    pub activations: usize,
    /// Batches.
    pub input: usize,
    /// What operations hold beside operands and results: kernels' workspaces and tables, operands joined or gathered.
    pub workspace: usize,
    /// What is on its way to other ranks, on the CPU.
    pub messages: usize,
    /// What an evaluation needs besides.
    pub evaluation: usize,
}

impl RankMemory {
    /// All kinds, each with its name, those of the state first.
    pub fn kinds(&self) -> [(&'static str, usize); 11] {
        [
            ("weights", self.weights),
            ("moments", self.moments),
            ("moving average", self.average),
            ("gradients", self.gradients),
            ("gathered weights", self.gathered),
            ("gradients of blocks", self.unit_gradients),
            ("activations", self.activations),
            ("input", self.input),
            ("workspace", self.workspace),
            ("messages", self.messages),
            ("evaluation", self.evaluation),
        ]
    }

    /// Weights, moments, moving average and gradients.
    pub fn state(&self) -> usize {
        self.weights + self.moments + self.average + self.gradients
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.kinds().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Bytes of a batch in host memory: pixels, places of the tokens, and for each image slot its start, grid, weight,
/// sample, epoch, and target of so many bytes.
pub fn batch_bytes(tokens: usize, slots: usize, patch_dim: usize, target: usize) -> usize {
    tokens * (patch_dim + 4) + 4 * (slots + 1) + slots * (4 + 4 + 8 + 8 + target)
}

/// The same where a device makes the patches, at most: of decoded images as many as have room.
pub fn picture_bytes(recipe: &Recipe, slots: usize, target: usize) -> usize {
    let (tokens, views) = (recipe.packing.tokens, views(recipe, slots));
    let rows = tokens * size_of::<[i32; 3]>();
    batch_bytes(tokens, slots, 0, target) + views.bytes + views.pictures * size_of::<Record>() + rows
}

/// Bytes of the texts of a batch, where there are any.
pub fn text_bytes(recipe: &Recipe, slots: usize) -> usize {
    match recipe.text.is_on() {
        true => batch_bytes(recipe.text_tokens(slots), slots, 0, size_of::<i32>()),
        false => 0,
    }
}

/// Bytes of an image's target: as it is loaded, as an engine is given it, and as a device takes it.
pub fn target_bytes(recipe: &Recipe, classes: usize) -> [usize; 3] {
    let soft = classes * size_of::<f32>();
    let loaded = if recipe.mix.is_on() { size_of::<Mixture>() } else { size_of::<i32>() };
    match (recipe.distill.is_on(), recipe.mix.is_on()) {
        (true, _) => [loaded, soft, soft],
        (false, true) => [loaded, loaded, soft],
        (false, false) => [loaded; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_all_there_is() {
        let all = RankMemory {
            weights: 1,
            moments: 2,
            average: 4,
            gradients: 8,
            gathered: 16,
            unit_gradients: 32,
            activations: 64,
            input: 128,
            workspace: 256,
            messages: 512,
            evaluation: 1024,
        };
        assert_eq!((all.total(), all.state()), (2047, 15));
        // 10 tokens of 3 values and 2 slots: 70 + 12 + 56.
        assert_eq!(batch_bytes(10, 2, 3, 4), 138);
    }

    #[test]
    fn pictures_have_more_room_than_patches() {
        let mut recipe = Recipe::default();
        (recipe.packing.tokens, recipe.model.patch) = (256, 16);
        // A token has room for 8 patches, and tables.
        let patches = batch_bytes(256, 4, 3 * 256, 4);
        let alone = picture_bytes(&recipe, 4, 4);
        assert!(
            alone > patches + 7 * 256 * 3 * 256 && alone < 2 * 8 * 256 * 3 * 256,
            "{alone} and {patches}"
        );
        recipe.mix.mixup = 0.8;
        assert!(picture_bytes(&recipe, 4, 4) > alone + 8 * 256 * 3 * 256, "and the partner as much");
    }

    #[test]
    fn targets_grow_where_they_are_soft() {
        let mut recipe = Recipe::default();
        assert_eq!(target_bytes(&recipe, 10), [4, 4, 4]);
        recipe.mix.cutmix = 1.0;
        assert_eq!(target_bytes(&recipe, 10), [16, 16, 40]);
        recipe.distill.teacher = "runs/teacher".into();
        assert_eq!(target_bytes(&recipe, 10), [16, 40, 40]);
        recipe.mix.cutmix = 0.0;
        assert_eq!(target_bytes(&recipe, 10), [4, 40, 40]);
    }
}
