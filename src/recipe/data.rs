//! Where images come from, their resolution, how they are packed, which tokens are dropped.

use serde::{Deserialize, Serialize};

choice! {
    /// Kind of image source.
    SourceKind {
        /// The built-in handwritten digits.
        Digits = "digits",
        /// Decide from what `path` holds.
        Auto = "auto",
        /// Class folders.
        Folder = "folder",
        /// Tar shards in the WebDataset convention.
        Tar = "tar",
        /// IDX files (MNIST family).
        Idx = "idx",
        /// CIFAR-10/100 binary files.
        Cifar = "cifar",
    }
}

choice! {
    /// Where decoded images become patches.
    ViewsKind {
        /// On the threads that decode them.
        Host = "host",
        /// In training on a GPU, there; the host only decodes.
        Device = "device",
    }
}

/// Where images come from and how they are normalised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Kind of source.
    pub source: SourceKind,
    /// Folder, or pattern such as `shards-{000..127}.tar`; empty for the built-in data.
    pub path: String,
    /// Share of a set without a validation split that is held out for validation (seeded).
    pub validation: f64,
    /// Share of unreadable images above which the run stops.
    pub max_unreadable: f64,
    /// Per-channel mean on the 0..1 scale; one value serves all channels.
    pub mean: Vec<f32>,
    /// Per-channel standard deviation on the 0..1 scale.
    pub std: Vec<f32>,
    /// Whether images are flipped horizontally at random during training.
    pub flip: bool,
    /// Decode and resize threads; 0 takes what the machine has.
    pub workers: usize,
    /// Memory for decoded images in MiB; 0 keeps none.
    pub cache_mib: usize,
    /// Where training images are cropped, resized, augmented, mixed and cut into patches; the pixels are the same.
    pub views: ViewsKind,
}

choice! {
    /// Distribution of the training resolution.
    ResolutionKind {
        /// Always `max`.
        Fixed = "fixed",
        /// Uniform in [min, max].
        Uniform = "uniform",
        /// Truncated normal: u ~ N(mean, std) cut to [−1, 1], mapped to [min, max].
        TruncatedNormal = "truncated-normal",
        /// The image's own size, never enlarged, bounded by `max`.
        Native = "native",
    }
}

choice! {
    /// Which quantity the distribution draws.
    ResolutionOf {
        /// Side length of a square with the image's area.
        Side = "side",
        /// The area.
        Area = "area",
    }
}

choice! {
    /// What happens to the aspect ratio.
    AspectKind {
        /// Kept.
        Native = "native",
        /// Resized to a square.
        Square = "square",
    }
}

choice! {
    /// How a size that is no multiple of the patch becomes a grid.
    RemainderKind {
        /// The image is resized to the nearest grid, distorted by at most half a patch a side.
        Round = "round",
        /// The remainder is cut off, as a strided convolution does.
        Drop = "drop",
    }
}

/// To which size each image is resized. Resolution R means area R², aspect ratio kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResolutionConfig {
    /// Distribution during training.
    pub kind: ResolutionKind,
    /// Smallest resolution in pixels.
    pub min: usize,
    /// Largest resolution in pixels.
    pub max: usize,
    /// Whether the side or the area is drawn.
    pub of: ResolutionOf,
    /// Mean of the truncated normal on [−1, 1].
    pub mean: f64,
    /// Standard deviation of the truncated normal.
    pub std: f64,
    /// Native aspect ratio, or squares.
    pub aspect: AspectKind,
    /// Rounding to the patch grid.
    pub remainder: RemainderKind,
}

choice! {
    /// Which images share a batch.
    PackingKind {
        /// Greedy first-fit into `open` bins of `sequence` tokens (NaViT, section 2.3).
        Bins = "bins",
        /// Images in order until the token budget is full.
        Flat = "flat",
    }
}

choice! {
    /// What an image that is taken into the gap of a closing bin or batch gives up to fill it.
    FitKind {
        /// Nothing: gaps are padded.
        None = "none",
        /// Its drawn resolution.
        Resolution = "resolution",
        /// Its drawn drop rate.
        Drop = "drop",
    }
}

/// How images share a batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PackingConfig {
    /// First-fit bins or flat budget.
    pub kind: PackingKind,
    /// Token budget T of one batch, a multiple of 128.
    pub tokens: usize,
    /// Image slots N of one batch; 0 derives it from T and the shortest image.
    pub images: usize,
    /// Bin length L in tokens (`bins`); divides `tokens`.
    pub sequence: usize,
    /// Bins that are open at a time (`bins`).
    pub open: usize,
    /// Images that the flat mode, and `fit`, may look ahead to fill the tail of a batch.
    pub lookahead: usize,
    /// Whether images are fitted to the gaps of closing bins, or of the batch (NaViT, section 2.3).
    pub fit: FitKind,
}

choice! {
    /// Distribution of the per-image token-drop rate.
    DropKind {
        /// No dropping.
        None = "none",
        /// The same rate for every image.
        Constant = "constant",
        /// Beta(mean, max), NaViT appendix A.4.
        Beta = "beta",
        /// Normal around a mean that grows with the length, from `min` to `max` (NaViT, appendix A.4).
        Resolution = "resolution",
        /// The same for all images, following a sigmoid of the images seen, between `min` and `max` (NaViT, appendix
        /// A.5).
        Schedule = "schedule",
    }
}

/// Which tokens are dropped during training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DropConfig {
    /// Distribution of the rate.
    pub kind: DropKind,
    /// Mean rate (`constant`, `beta`).
    pub mean: f64,
    /// Mean rate of the shortest images (`resolution`); lower end of the sigmoid (`schedule`).
    pub min: f64,
    /// Largest rate (`beta`, and whatever is fitted by `packing.fit = "drop"`); mean rate of the longest images
    /// (`resolution`); upper end of the sigmoid (`schedule`).
    pub max: f64,
    /// Standard deviation (`resolution`), cut at two of them.
    pub std: f64,
    /// Images seen halfway between the ends, as a share of `images` (`schedule`).
    pub midpoint: f64,
    /// Timescale of the sigmoid as a share of `images`; the rate falls where it is negative (`schedule`).
    pub timescale: f64,
    /// Images of the run (`schedule`); 0 derives it from steps, token budget and expected tokens of an image.
    pub images: u64,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            source: SourceKind::Auto,
            path: String::new(),
            validation: 0.2,
            max_unreadable: 0.01,
            mean: vec![0.485, 0.456, 0.406],
            std: vec![0.229, 0.224, 0.225],
            flip: true,
            workers: 0,
            cache_mib: 0,
            views: ViewsKind::Host,
        }
    }
}

impl Default for ResolutionConfig {
    fn default() -> Self {
        Self {
            kind: ResolutionKind::Uniform,
            min: 64,
            max: 256,
            of: ResolutionOf::Side,
            mean: -0.5,
            std: 1.0,
            aspect: AspectKind::Native,
            remainder: RemainderKind::Round,
        }
    }
}

impl Default for PackingConfig {
    fn default() -> Self {
        Self {
            kind: PackingKind::Flat,
            tokens: 4096,
            images: 0,
            sequence: 256,
            open: 256,
            lookahead: 64,
            fit: FitKind::None,
        }
    }
}

impl Default for DropConfig {
    fn default() -> Self {
        Self {
            kind: DropKind::None,
            mean: 0.5,
            min: 0.1,
            max: 0.9,
            std: 0.02,
            midpoint: 0.5,
            timescale: -0.1,
            images: 0,
        }
    }
}
