//! Position embeddings.

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
    /// Resampling filter of a learned table under fractional coordinates. They differ visibly: take the one that the
    /// weights were trained with.
    PositionResample {
        /// Linear per axis without antialiasing: torch's `linear` and `bilinear` (timm's factorised tables, DPT).
        Linear = "linear",
        /// The same with the first and the last row kept in place, `align_corners=True`: `scipy.ndimage.zoom` of order
        /// 1 (big_vision; C-RADIO, Qwen3-VL).
        LinearAlignCorners = "linear-align-corners",
        /// Antialiased cubic, a = −0.5 (timm's 2-D tables; DINOv2 with registers).
        Bicubic = "bicubic",
        /// Cubic without antialiasing, a = −0.75, torch's `bicubic` (Meta's DeiT; ViT, DeiT, SigLIP and DINOv2 of
        /// transformers).
        BicubicNoAntialias = "bicubic-no-antialias",
        /// The same at the scale (L + 0.1)/L₀ in the place of L/L₀ (the original code of DINO and of DINOv2 without
        /// registers, `interpolate_offset=0.1`).
        BicubicOffset = "bicubic-offset",
        /// Antialiased triangle (SigLIP 2).
        Bilinear = "bilinear",
    }
}

/// Position embedding: basis × coordinate × combination (NaViT Table 3 and the aspect-preserving variant).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
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
