//! A recipe: everything that decides a run, as TOML. Named recipes are embedded in the binary,
//! extend each other with `extends`, and are overridden on the command line with `--set`.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Everything that decides a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// One line for `trencadis recipes`.
    pub description: String,
    /// The network.
    pub model: ModelConfig,
    /// Where images come from and how they are normalised.
    pub data: DataConfig,
    /// To which size each image is resized.
    pub resolution: ResolutionConfig,
    /// How images share a batch.
    pub packing: PackingConfig,
    /// Which tokens are dropped during training.
    pub drop: DropConfig,
    /// Optimiser, schedule, saving.
    pub train: TrainConfig,
    /// Evaluation.
    pub eval: EvalConfig,
}

/// The network. `shape` gives width, depth, mlp and heads; a non-zero value of these overrides it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Name in the shape table (`mu`, `Ti`, `S`, `M`, `B`, `L`, `So400m`, `H`, `H-52`, `g`, `G`, `e`, `22B`), or empty.
    pub shape: String,
    /// Model width D; 0 takes the shape's.
    pub width: usize,
    /// Number of blocks; 0 takes the shape's.
    pub depth: usize,
    /// Hidden width of the MLP; 0 takes the shape's.
    pub mlp: usize,
    /// Attention heads; 0 takes the shape's.
    pub heads: usize,
    /// Width of one attention head; 0 takes width / heads. Queries, keys and values are heads × head_dim wide.
    pub head_dim: usize,
    /// Factor on q·k before the softmax; 0 takes 1/√head_dim. vit-pytorch's NaViT uses 1.
    pub attention_scale: f64,
    /// Patch side P in pixels.
    pub patch: usize,
    /// Image channels (1 grey, 3 RGB).
    pub channels: usize,
    /// Serial pre-norm blocks or ViT-22B's parallel ones.
    pub block: BlockKind,
    /// Normalisation of the residual stream.
    pub norm: NormKind,
    /// Whether norms carry a bias.
    pub norm_bias: bool,
    /// Epsilon of every norm but those of queries and keys.
    pub norm_eps: f64,
    /// Whether the flattened patches are normalised before the patch embedding (`patch_embed.norm_in`).
    pub patch_norm_in: bool,
    /// Whether tokens are normalised after the patch embedding, before positions are added
    /// (`patch_embed.norm_out`).
    pub patch_norm_out: bool,
    /// Whether all tokens are normalised after the last block (`norm`).
    pub final_norm: bool,
    /// Whether the pooled vector is normalised before the head (`head_norm`): timm's `fc_norm`.
    pub head_norm: bool,
    /// Normalisation of queries and keys.
    pub qk_norm: QkNormKind,
    /// One gain per head, or one shared by all heads.
    pub qk_norm_per_head: bool,
    /// Epsilon of the norms of queries and keys, added to the mean square or the variance.
    pub qk_norm_eps: f64,
    /// Bias on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention output projection.
    pub proj_bias: bool,
    /// Bias on the MLP's two layers.
    pub mlp_bias: bool,
    /// Bias on the classification head.
    pub head_bias: bool,
    /// Bias on the patch embedding.
    pub patch_bias: bool,
    /// GELU: exact (erf) or its tanh approximation.
    pub gelu: GeluKind,
    /// LayerScale initial value; 0 leaves LayerScale out.
    pub layer_scale: f64,
    /// Stochastic-depth rate.
    pub drop_path: f64,
    /// Whether the rate rises linearly with depth (timm) or is the same everywhere (DeiT III).
    pub drop_path_linear: bool,
    /// Whether a cls token is prepended.
    pub class_token: bool,
    /// Number of register tokens.
    pub registers: usize,
    /// How tokens become one vector per image.
    pub pool: PoolKind,
    /// Whether the MAP head has an MLP with residual (Zhai et al. 2022, timm, SigLIP; vit-pytorch's
    /// NaViT has none).
    pub pool_mlp: bool,
    /// Whether the MAP head normalises queries and keys as the blocks do.
    pub pool_qk_norm: bool,
    /// Whether the MAP head normalises its query vector before projecting it (`pool.norm`).
    pub pool_query_norm: bool,
    /// Whether the MAP head adds its query vector to the attention output (vit-pytorch's NaViT).
    pub pool_residual: bool,
    /// Position embedding.
    pub position: PositionConfig,
    /// Initial bias of the head (ViT-22B uses −10 with the sigmoid loss).
    pub head_init_bias: f64,
    /// Recompute every block in the backward pass instead of keeping its activations.
    pub checkpoint: bool,
}

macro_rules! choice {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name { $($(#[$doc])* #[serde(rename = $text)] $variant),+ }
    };
}

choice! {
    /// Structure of a transformer block.
    BlockKind {
        /// `x + attn(norm(x))`, then `x + mlp(norm(x))`.
        Serial = "serial",
        /// `x + attn(y) + mlp(y)` with one shared `y = norm(x)` (ViT-22B).
        Parallel = "parallel",
    }
}
choice! {
    /// Normalisation of the residual stream.
    NormKind {
        /// Centred, divided by the standard deviation.
        LayerNorm = "layernorm",
        /// Divided by the root mean square.
        Rms = "rmsnorm",
    }
}
choice! {
    /// Normalisation of queries and keys over the head dimension.
    QkNormKind {
        /// None.
        None = "none",
        /// Root mean square, with a gain.
        Rms = "rms",
        /// LayerNorm with a gain and no bias.
        LayerNorm = "layernorm",
        /// LayerNorm with gain and bias (timm).
        LayerNormBias = "layernorm-bias",
    }
}
choice! {
    /// GELU variant.
    GeluKind {
        /// Exact.
        Erf = "erf",
        /// tanh approximation.
        Tanh = "tanh",
    }
}
choice! {
    /// Pooling of an image's tokens.
    PoolKind {
        /// Masked attention pooling (MAP).
        Map = "map",
        /// Mean of the patch tokens.
        Mean = "mean",
        /// The cls token.
        Cls = "cls",
    }
}
choice! {
    /// How a coordinate becomes a vector.
    PositionBasis {
        /// A learned table.
        Learned = "learned",
        /// Fixed sines and cosines (Vaswani 2017).
        Sinusoidal = "sinusoidal",
        /// Sine and cosine of one learned linear map of (y, x) (Tancik 2020).
        Fourier = "fourier",
        /// No position embedding.
        None = "none",
    }
}
choice! {
    /// What a coordinate is.
    PositionCoordinate {
        /// The integer patch index.
        Absolute = "absolute",
        /// The index divided by the image's rows or columns; tables are resampled to the grid.
        Fractional = "fractional",
        /// The index divided by the longer side, so that the aspect ratio is kept.
        FractionalAspect = "fractional-aspect",
    }
}
choice! {
    /// How row and column are combined.
    PositionCombination {
        /// One table over the flattened index (ViT).
        Flat = "flat",
        /// One table over (row, column) (Pix2Struct; with fractional coordinates, ViT's resized table).
        Joint = "joint",
        /// Row vector plus column vector.
        Sum = "sum",
        /// Row vector stacked on column vector, half the width each.
        Stack = "stack",
        /// Row vector times column vector.
        Product = "product",
    }
}
choice! {
    /// Resampling filter of a learned table under fractional coordinates.
    PositionResample {
        /// Linear per axis, no antialiasing (timm's factorised tables).
        Linear = "linear",
        /// Antialiased cubic, a = −0.5 (timm's and DeiT's 2-D tables).
        Bicubic = "bicubic",
        /// Antialiased triangle (SigLIP 2).
        Bilinear = "bilinear",
    }
}

/// Position embedding: basis × coordinate × combination (NaViT Table 3 and the aspect-preserving variant).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PositionConfig {
    /// How a coordinate becomes a vector.
    pub basis: PositionBasis,
    /// What a coordinate is.
    pub coordinate: PositionCoordinate,
    /// How row and column are combined.
    pub combination: PositionCombination,
    /// Table rows (maxLen in patches) of the row axis.
    pub rows: usize,
    /// Table rows of the column axis.
    pub columns: usize,
    /// Resampling of a learned table under fractional coordinates.
    pub resample: PositionResample,
    /// Standard deviation of the Fourier map at initialisation, for coordinates from 0 to 1; with
    /// absolute ones it is divided by the larger of `rows` and `columns`.
    pub fourier_std: f64,
}

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
    /// Images that the flat mode may look ahead to fill the tail of a batch.
    pub lookahead: usize,
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
    }
}

/// Which tokens are dropped during training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DropConfig {
    /// Distribution of the rate.
    pub kind: DropKind,
    /// Mean rate.
    pub mean: f64,
    /// Largest rate (`beta`).
    pub max: f64,
}

choice! {
    /// Shape of the learning rate after warm-up.
    ScheduleKind {
        /// Half a cosine to `lr_min`.
        Cosine = "cosine",
        /// A straight line to `lr_min`.
        Linear = "linear",
        /// Flat.
        Constant = "constant",
        /// `1/√(1 + (t − warmup)/timescale)`, with a linear cool-down.
        Rsqrt = "rsqrt",
    }
}
choice! {
    /// Training loss.
    LossKind {
        /// Softmax cross-entropy.
        Softmax = "softmax",
        /// Sigmoid cross-entropy, summed over classes.
        Sigmoid = "sigmoid",
    }
}

/// Optimiser (AdamW), schedule, saving.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimiser steps.
    pub steps: u64,
    /// Batches whose gradients are accumulated into one step.
    pub accumulate: usize,
    /// Seed of every random decision.
    pub seed: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Final learning rate of `cosine` and `linear`.
    pub lr_min: f64,
    /// Schedule after warm-up.
    pub schedule: ScheduleKind,
    /// Warm-up steps.
    pub warmup: u64,
    /// Cool-down steps to zero at the end (`rsqrt`, `constant`).
    pub cooldown: u64,
    /// Timescale of `rsqrt` in steps; 0 takes the warm-up.
    pub timescale: u64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Weight decay of the head; negative takes `weight_decay`.
    pub head_weight_decay: f64,
    /// AdamW β1.
    pub beta1: f64,
    /// AdamW β2.
    pub beta2: f64,
    /// AdamW ε.
    pub eps: f64,
    /// Largest global gradient norm; 0 does not clip.
    pub clip: f64,
    /// Decay of the exponential moving average of the weights; 0 keeps none.
    pub ema: f64,
    /// Loss.
    pub loss: LossKind,
    /// Label smoothing.
    pub label_smoothing: f64,
    /// Steps between evaluations; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Steps between saves of `last`; 0 saves at evaluations only.
    pub save_every: u64,
    /// Steps between kept checkpoints `step-N`; 0 keeps none but best and last.
    pub keep_every: u64,
    /// Steps between metric lines.
    pub log_every: u64,
}

/// Evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Resolution at evaluation; 0 takes `resolution.max`.
    pub resolution: usize,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            shape: "Ti".into(),
            width: 0,
            depth: 0,
            mlp: 0,
            heads: 0,
            head_dim: 0,
            attention_scale: 0.0,
            patch: 16,
            channels: 3,
            block: BlockKind::Serial,
            norm: NormKind::LayerNorm,
            norm_bias: false,
            norm_eps: 1e-6,
            patch_norm_in: false,
            patch_norm_out: false,
            final_norm: true,
            head_norm: false,
            qk_norm: QkNormKind::Rms,
            qk_norm_per_head: true,
            qk_norm_eps: 1e-6,
            qkv_bias: false,
            proj_bias: false,
            mlp_bias: true,
            head_bias: true,
            patch_bias: true,
            gelu: GeluKind::Erf,
            layer_scale: 0.0,
            drop_path: 0.0,
            drop_path_linear: false,
            class_token: false,
            registers: 0,
            pool: PoolKind::Map,
            pool_mlp: false,
            pool_qk_norm: true,
            pool_query_norm: false,
            pool_residual: false,
            position: PositionConfig::default(),
            head_init_bias: 0.0,
            checkpoint: false,
        }
    }
}

impl Default for PositionConfig {
    fn default() -> Self {
        Self {
            basis: PositionBasis::Learned,
            coordinate: PositionCoordinate::Absolute,
            combination: PositionCombination::Sum,
            rows: 64,
            columns: 64,
            resample: PositionResample::Linear,
            fourier_std: 1.0,
        }
    }
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
        Self { kind: PackingKind::Flat, tokens: 4096, images: 0, sequence: 256, open: 256, lookahead: 64 }
    }
}

impl Default for DropConfig {
    fn default() -> Self {
        Self { kind: DropKind::None, mean: 0.5, max: 0.9 }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            accumulate: 1,
            seed: 0,
            lr: 1e-3,
            lr_min: 1e-5,
            schedule: ScheduleKind::Cosine,
            warmup: 100,
            cooldown: 0,
            timescale: 0,
            weight_decay: 0.05,
            head_weight_decay: -1.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            clip: 1.0,
            ema: 0.0,
            loss: LossKind::Softmax,
            label_smoothing: 0.0,
            eval_every: 0,
            save_every: 0,
            keep_every: 0,
            log_every: 10,
        }
    }
}

impl ModelConfig {
    /// Tokens before each image's patches: cls, then registers.
    pub fn prefix(&self) -> usize {
        usize::from(self.class_token) + self.registers
    }

    /// Values of one flattened patch: channels × patch × patch.
    pub fn patch_dim(&self) -> usize {
        self.channels * self.patch * self.patch
    }
}

/// Keys of [`ModelConfig`] that do not change what a given set of weights computes.
const TRAINING_ONLY: &[&str] =
    &["drop_path", "drop_path_linear", "checkpoint", "head_init_bias", "head_bias"];

impl ModelConfig {
    /// What this description and `other` disagree on: "model.key is A there and B here". Sizes are compared by
    /// the shapes of the weights, and what only matters in training is left out.
    ///
    /// # Errors
    /// If a shape is unknown.
    pub fn differences(&self, other: &Self) -> Result<Vec<String>> {
        let resolved = |config: &Self| -> Result<toml::Table> {
            let mut config = config.clone();
            let dims = config.dimensions()?;
            // Widths and depth show in the weights' shapes; the number of heads need not.
            (config.shape, config.heads) = (String::new(), dims.heads);
            (config.width, config.depth, config.mlp, config.head_dim) = (0, 0, 0, 0);
            config.attention_scale = match config.attention_scale {
                0.0 => 1.0,
                scale => scale * (dims.head_dim as f64).sqrt(),
            };
            config.position.fourier_std = 0.0;
            toml::Table::try_from(config).map_err(Error::failure)
        };
        let mut found = Vec::new();
        compare("model", &resolved(self)?, &resolved(other)?, &mut found);
        Ok(found)
    }
}

fn compare(path: &str, there: &toml::Table, here: &toml::Table, found: &mut Vec<String>) {
    for (key, there) in there.iter().filter(|(key, _)| !TRAINING_ONLY.contains(&key.as_str())) {
        match (there, here.get(key)) {
            (toml::Value::Table(there), Some(toml::Value::Table(here))) => {
                compare(&format!("{path}.{key}"), there, here, found);
            }
            (there, Some(here)) if there != here => {
                found.push(format!("{path}.{key} is {there} there and {here} here"));
            }
            _ => {}
        }
    }
}
