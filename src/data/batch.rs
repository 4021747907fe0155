//! The packed batch: the one data layout that data, models, CPU ops and kernels share.
//!
//! `T` tokens (a budget, multiple of 128) and `N` image slots are constants of a recipe; only
//! contents vary. Images lie one after another, padding lies only at the tail of `T`, unused
//! slots have length 0.

use std::sync::Arc;

use crate::kernels::view::{Picture, Views};

/// `positions` of a prefix token (cls, registers): it has no place in the patch grid.
pub const PREFIX: [u16; 2] = [u16::MAX, u16::MAX];

/// Flattened patches `[T, C*P*P]`, inner order (channel, row, column); zero at prefix tokens and
/// at padding.
#[derive(Clone, Debug)]
pub enum Patches {
    /// Pixel values 0..=255, normalised on the device.
    U8(Vec<u8>),
    /// Values that are used as they are.
    F32(Vec<f32>),
    /// Pictures as they were decoded, of which a GPU makes patches; the CPU device does not take them.
    Pictures(Pictures),
}

/// Decoded images with what a device needs to make patches of them.
#[derive(Clone, Debug)]
pub struct Pictures {
    /// The images in their order, each followed by what is mixed into it.
    pub pictures: Arc<Vec<Picture>>,
    /// `[T]` the picture of each token, counted from 1, with row and column of the patch's first pixel; zeros at prefix
    /// tokens and padding.
    pub rows: Vec<[i32; 3]>,
    /// What memory is made for.
    pub shape: Views,
}

/// What each image should be recognised as.
#[derive(Clone, Debug)]
pub enum Targets {
    /// `[N]` class indices; 0 on unused slots.
    Classes(Vec<i32>),
    /// `[N]` the classes of images that are mixed of two.
    Mixed(Vec<Mixture>),
    /// `[N, K]` soft targets, row-major.
    Soft(Vec<f32>),
}

/// A soft target with at most two classes, as mixup and CutMix make them: `shares[i]` at `classes[i]`, 0 elsewhere;
/// where both classes are one, their sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mixture {
    /// Class indices.
    pub classes: [i32; 2],
    /// How much of each.
    pub shares: [f32; 2],
}

impl Mixture {
    /// One class alone.
    pub fn one(class: i32) -> Self {
        Self { classes: [class; 2], shares: [1.0, 0.0] }
    }

    /// `share` of the first class and the rest of the second.
    pub fn new(first: i32, second: i32, share: f32) -> Self {
        match first == second {
            true => Self::one(first),
            false => Self { classes: [first, second], shares: [share, 1.0 - share] },
        }
    }

    /// What is above 0 becomes 1, as DeiT III trains with binary cross-entropy (facebookresearch/deit, `engine.py`:
    /// `targets.gt(0.0)`).
    pub fn binarised(self) -> Self {
        Self { shares: self.shares.map(|share| if share > 0.0 { 1.0 } else { 0.0 }), ..self }
    }

    /// The class with the larger share, of equal ones the higher, as of soft targets the last of the largest.
    pub fn largest(&self) -> i32 {
        let ([first, second], [a, b]) = (self.classes, self.shares);
        if a > b || a == b && first > second { first } else { second }
    }
}

/// What the tokens of a batch are of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Modality {
    /// Patches of images.
    #[default]
    Images,
    /// Word pieces of texts.
    Texts,
}

/// Many images of any shape in one sequence; or many texts, which have no patches, and for the position of a token its
/// id and its place in the text.
#[derive(Clone, Debug)]
pub struct PackedBatch {
    /// `[T, patch_dim]`.
    pub patches: Patches,
    /// Channels × patch × patch.
    pub patch_dim: usize,
    /// `[N+1]` start of each image, counting its prefix tokens; the last used value repeats.
    pub cu_seqlens: Vec<i32>,
    /// `[T]` (patch row, patch column) in the full grid; [`PREFIX`] for prefix tokens, (0, 0) at padding.
    pub positions: Vec<[u16; 2]>,
    /// `[N]` the image's full patch grid (rows, columns), before token dropping.
    pub grids: Vec<[u16; 2]>,
    /// What each slot should be recognised as.
    pub targets: Targets,
    /// `[N]` loss weight, 0 on unused slots.
    pub weights: Vec<f32>,
    /// `[N]` the sample's id in its source; 0 on unused slots.
    pub sample_ids: Vec<u64>,
    /// `[N]` the epoch in which the sample was drawn (times `augment.repeats`, and the number of the repetition); with
    /// the id, the key of its random numbers.
    pub epochs: Vec<u64>,
    /// Number of used slots; slots from here on are empty.
    pub images: usize,
    /// The texts of the same slots, packed alike, where images are learned from texts.
    pub texts: Option<Box<PackedBatch>>,
}

impl PackedBatch {
    /// The batch of the images or of the texts.
    ///
    /// # Panics
    /// If texts are asked for and there are none: a bug of the caller, not of a user.
    pub fn of(&self, modality: Modality) -> &Self {
        match modality {
            Modality::Images => self,
            Modality::Texts => self.texts.as_deref().expect("a model of texts runs over batches of texts"),
        }
    }

    /// Token budget `T`.
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Image slots `N`.
    pub fn slots(&self) -> usize {
        self.grids.len()
    }

    /// Tokens that belong to an image, prefix tokens included; the rest is padding.
    pub fn live_tokens(&self) -> usize {
        self.cu_seqlens[self.images] as usize
    }

    /// Token range of image `slot`.
    pub fn range(&self, slot: usize) -> std::ops::Range<usize> {
        self.cu_seqlens[slot] as usize..self.cu_seqlens[slot + 1] as usize
    }

    /// Σ S² over the images: attention's share of the arithmetic.
    pub fn sum_squared_lengths(&self) -> f64 {
        (0..self.images).map(|i| (self.range(i).len() as f64).powi(2)).sum()
    }

    /// The same images with `to` prefix tokens where they have `from`, in a budget of `tokens`, which holds them: for a
    /// model with another prefix.
    pub fn with_prefix(&self, from: usize, to: usize, tokens: usize) -> Self {
        let mut positions = Vec::with_capacity(tokens);
        let mut cu_seqlens = vec![0];
        for slot in 0..self.images {
            let range = self.range(slot);
            positions.extend(std::iter::repeat_n(PREFIX, to));
            positions.extend_from_slice(&self.positions[range.start + from..range.end]);
            cu_seqlens.push(positions.len() as i32);
        }
        cu_seqlens.resize(self.slots() + 1, positions.len() as i32);
        positions.resize(tokens, [0, 0]);
        let own =
            |slot| (self.range(slot).start + from) * self.patch_dim..self.range(slot).end * self.patch_dim;
        let images = (0..self.images).map(own);
        let len = tokens * self.patch_dim;
        let patches = match &self.patches {
            Patches::U8(values) => Patches::U8(spread(values, images, to * self.patch_dim, len)),
            Patches::F32(values) => Patches::F32(spread(values, images, to * self.patch_dim, len)),
            Patches::Pictures(Pictures { pictures, rows, shape }) => {
                let images = (0..self.images).map(|slot| self.range(slot).start + from..self.range(slot).end);
                Patches::Pictures(Pictures {
                    pictures: pictures.clone(),
                    rows: spread(rows, images, to, tokens),
                    shape: Views { tokens, ..*shape },
                })
            }
        };
        Self {
            patches,
            patch_dim: self.patch_dim,
            cu_seqlens,
            positions,
            grids: self.grids.clone(),
            targets: self.targets.clone(),
            weights: self.weights.clone(),
            sample_ids: self.sample_ids.clone(),
            epochs: self.epochs.clone(),
            images: self.images,
            texts: self.texts.clone(),
        }
    }
}

/// The `parts` of `values`, each after `gap` zeros, and zeros up to `len`.
fn spread<T: Copy + Default>(
    values: &[T],
    parts: impl Iterator<Item = std::ops::Range<usize>>,
    gap: usize,
    len: usize,
) -> Vec<T> {
    let mut spread = Vec::with_capacity(len);
    for part in parts {
        spread.resize(spread.len() + gap, T::default());
        spread.extend_from_slice(&values[part]);
    }
    spread.resize(len, T::default());
    spread
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_comes_and_goes() {
        // Two images of 2 and 1 tokens of two values, and an unused slot.
        let batch = PackedBatch {
            patches: Patches::U8((1..=8).collect()),
            patch_dim: 2,
            cu_seqlens: vec![0, 2, 3, 3],
            positions: vec![[0, 0], [0, 1], [0, 0], [0, 0]],
            grids: vec![[1, 2], [1, 1], [0, 0]],
            targets: Targets::Classes(vec![3, 4, 0]),
            weights: vec![1.0, 1.0, 0.0],
            sample_ids: vec![7, 8, 0],
            epochs: vec![1, 2, 0],
            images: 2,
            texts: None,
        };
        let longer = batch.with_prefix(0, 2, 8);
        assert_eq!(longer.cu_seqlens, [0, 4, 7, 7]);
        assert_eq!(longer.positions, [PREFIX, PREFIX, [0, 0], [0, 1], PREFIX, PREFIX, [0, 0], [0, 0]]);
        let Patches::U8(values) = &longer.patches else { panic!("bytes stay bytes") };
        assert_eq!(values, &[0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 5, 6, 0, 0]);
        let back = longer.with_prefix(2, 0, 4);
        assert_eq!((&back.cu_seqlens, &back.positions), (&batch.cu_seqlens, &batch.positions));
        let Patches::U8(values) = &back.patches else { panic!("bytes stay bytes") };
        assert_eq!(values, &[1, 2, 3, 4, 5, 6, 0, 0], "what was no image's is gone");
        assert_eq!(
            (back.weights, back.sample_ids, back.epochs),
            (batch.weights, batch.sample_ids, batch.epochs)
        );
    }
}
