//! The network.

use serde::{Deserialize, Serialize};

use super::compare::differences;
use super::{GeluKind, NormKind, PositionBasis, PositionConfig, PositionCoordinate, QkNormKind, RopeConfig};
use crate::error::{Error, Result};

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
    /// Key and value heads, a divisor of `heads`: so many query heads in a row share one (grouped-query attention). 0
    /// takes as many as there are heads.
    pub kv_heads: usize,
    /// Width of one attention head; 0 takes width / heads. Queries are heads × head_dim wide, keys and values
    /// kv_heads × head_dim each.
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
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Initial bias of the head (ViT-22B uses −10 with the sigmoid loss).
    pub head_init_bias: f64,
    /// Which activations are computed again in the backward pass instead of being kept.
    pub recompute: Recompute,
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
    /// What the backward pass computes again, as Megatron-LM's `--recompute-granularity` names it. The result is the same.
    Recompute {
        /// Nothing: all activations that it reads are kept.
        None = "none",
        /// What a pass over memory makes: results of norms, and GELU.
        Selective = "selective",
        /// Whole blocks, of which only the inputs are kept.
        Full = "full",
    }
}

impl Recompute {
    /// From the largest memory to the smallest.
    pub const ALL: [Self; 3] = [Self::None, Self::Selective, Self::Full];
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            shape: "Ti".into(),
            width: 0,
            depth: 0,
            mlp: 0,
            heads: 0,
            kv_heads: 0,
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
            rope: RopeConfig::default(),
            head_init_bias: 0.0,
            recompute: Recompute::None,
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
const TRAINING_ONLY: &[&str] = &["drop_path", "drop_path_linear", "recompute", "head_init_bias", "head_bias"];

impl ModelConfig {
    /// The same with defaults for what has no effect on what the network computes.
    pub fn in_effect(&self) -> Self {
        let default = Self::default();
        let mut own = self.clone();
        if own.pool != PoolKind::Map {
            own.pool_mlp = default.pool_mlp;
            own.pool_qk_norm = default.pool_qk_norm;
            own.pool_query_norm = default.pool_query_norm;
            own.pool_residual = default.pool_residual;
        }
        if own.qk_norm == QkNormKind::None {
            own.pool_qk_norm = default.pool_qk_norm;
            own.qk_norm_per_head = default.qk_norm_per_head;
            own.qk_norm_eps = default.qk_norm_eps;
        }
        let position = &mut own.position;
        if position.basis == PositionBasis::None {
            *position = PositionConfig { basis: PositionBasis::None, ..PositionConfig::default() };
        }
        if position.basis == PositionBasis::Fourier {
            // No table; the deviation, which these scale, is that of fresh weights.
            (position.rows, position.columns) = (default.position.rows, default.position.columns);
            position.resample = default.position.resample;
        }
        if position.coordinate == PositionCoordinate::Absolute {
            position.resample = default.position.resample;
        }
        own.rope = own.rope.in_effect();
        own
    }

    /// What this description and `other` disagree on: "model.key is A there and B here". Sizes are compared by
    /// the shapes of the weights, and what only matters in training is left out.
    ///
    /// # Errors
    /// If a shape is unknown.
    pub fn differences(&self, other: &Self) -> Result<Vec<String>> {
        let resolved = |config: &Self| -> Result<toml::Table> {
            let mut config = config.in_effect();
            let dims = config.dimensions()?;
            // Widths and depth show in the weights' shapes; the number of heads need not.
            (config.shape, config.heads, config.kv_heads) = (String::new(), dims.heads, dims.kv_heads);
            (config.width, config.depth, config.mlp, config.head_dim) = (0, 0, 0, 0);
            config.attention_scale = match config.attention_scale {
                0.0 => 1.0,
                scale => scale * (dims.head_dim as f64).sqrt(),
            };
            config.position.fourier_std = 0.0;
            // Any value but 0 switches LayerScale on; the weights replace it.
            if self.layer_scale > 0.0 && other.layer_scale > 0.0 {
                config.layer_scale = 1.0;
            }
            toml::Table::try_from(config).map_err(Error::failure)
        };
        Ok(differences("model.", &resolved(self)?, &resolved(other)?, TRAINING_ONLY))
    }
}
