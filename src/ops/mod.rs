//! What operations are told: kinds of norm, GELU, loss and position embedding, and what attention is like. Recipes
//! name them, `cpu` computes them, and the kernels are launched by them.
//!
//! The lowest room of the house: it stands on the standard library alone.

/// An enum whose variants a recipe names by these texts.
macro_rules! choice {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[cfg_attr(feature = "train", derive(serde::Serialize, serde::Deserialize))]
        pub enum $name {
            $($(#[$doc])* #[cfg_attr(feature = "train", serde(rename = $text))] $variant),+
        }

        impl $name {
            /// As recipes name it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text),+
                }
            }
        }
    };
}

mod filters;
mod position;
mod rope;

pub use filters::{Filter, FilterBank, MAX_RESAMPLED, resize_matrix};
pub use position::*;
pub use rope::*;

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
    /// Training loss.
    LossKind {
        /// Softmax cross-entropy.
        Softmax = "softmax",
        /// Sigmoid cross-entropy, summed over classes (NaViT, ViT-22B; big_vision's `sigmoid_xent`).
        Sigmoid = "sigmoid",
        /// Sigmoid cross-entropy, its mean over classes (DeiT III; PyTorch's `BCEWithLogitsLoss`).
        Bce = "bce",
    }
}

/// A loss of logits against the targets of classes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassificationLoss {
    /// Softmax or sigmoid cross-entropy.
    pub kind: LossKind,
    /// Label smoothing s, 0 to 1: a target becomes `(1 − s)·target + s/K`.
    pub smoothing: f64,
    /// T > 0: the softmax is that of logits / T, and the loss is multiplied by T², which leaves its gradient about as
    /// large as at T = 1 (Hinton et al., arXiv 1503.02531, section 2). The sigmoid losses know only T = 1.
    pub temperature: f64,
}

impl From<LossKind> for ClassificationLoss {
    /// Without smoothing, at temperature 1.
    fn from(kind: LossKind) -> Self {
        Self { kind, smoothing: 0.0, temperature: 1.0 }
    }
}

impl ClassificationLoss {
    /// Factor on the cross-entropy of an image with `classes` classes: T², or what makes a sum over classes a mean.
    pub fn unit(&self, classes: usize) -> f64 {
        match self.kind {
            LossKind::Softmax => self.temperature * self.temperature,
            LossKind::Sigmoid => 1.0,
            LossKind::Bce => 1.0 / classes.max(1) as f64,
        }
    }

    /// The same on the gradient by the logits, of which the cross-entropy sees logits / T.
    pub fn slope(&self, classes: usize) -> f64 {
        match self.kind {
            LossKind::Softmax => self.temperature,
            LossKind::Sigmoid | LossKind::Bce => self.unit(classes),
        }
    }
}

choice! {
    /// Loss of pairs of images and texts.
    ContrastiveKind {
        /// Softmax cross-entropy over the texts of an image and over the images of a text (CLIP).
        Softmax = "softmax",
        /// Sigmoid cross-entropy of every combination (SigLIP).
        Sigmoid = "sigmoid",
    }
}

/// Constants of an attention op.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads, a divisor of `heads`: query head h uses kv head h / (heads / kv_heads).
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f64,
    /// Normalisation of q and k over the head dimension.
    pub norm: QkNormKind,
    /// Epsilon of that normalisation.
    pub eps: f64,
    /// Whether gains are `[heads, head_dim]` (of k: `[kv_heads, head_dim]`) or one `[head_dim]` for all heads.
    pub gain_per_head: bool,
    /// Which columns of q and k are turned together, after the norm; `head_dim` is even where any are.
    pub rope: Rope,
}

impl AttentionConfig {
    /// Scores divided by √Dh, a kv head for each head, no norm, no rotation.
    pub fn new(heads: usize, head_dim: usize) -> Self {
        Self {
            heads,
            kv_heads: heads,
            head_dim,
            scale: 1.0 / (head_dim as f64).sqrt(),
            norm: QkNormKind::None,
            eps: 1e-6,
            gain_per_head: false,
            rope: Rope::None,
        }
    }

    /// Query heads that share a kv head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Columns of a row `[q | k | v]`.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of k, and of v.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Patch rows and columns of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "train", derive(serde::Serialize, serde::Deserialize))]
pub struct Grid {
    /// Patch rows.
    pub rows: usize,
    /// Patch columns.
    pub cols: usize,
}

impl Grid {
    /// Number of patches.
    pub fn patches(self) -> usize {
        self.rows * self.cols
    }
}
