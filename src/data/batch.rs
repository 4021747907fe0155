//! The packed batch: the one data layout that data, models, CPU ops and kernels share.
//!
//! `T` tokens (a budget, multiple of 128) and `N` image slots are constants of a recipe; only
//! contents vary. Images lie one after another, padding lies only at the tail of `T`, unused
//! slots have length 0.

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
}

/// What each image should be recognised as.
#[derive(Clone, Debug)]
pub enum Targets {
    /// `[N]` class indices; 0 on unused slots.
    Classes(Vec<i32>),
    /// `[N, K]` soft targets, row-major.
    Soft(Vec<f32>),
}

/// Many images of any shape in one sequence.
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
}

impl PackedBatch {
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
}
