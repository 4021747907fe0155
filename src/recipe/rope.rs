//! Rotary position embedding (Su et al. 2021), of the rows and columns of an image.

use serde::{Deserialize, Serialize};

choice! {
    /// Which two columns of a head are turned together by a rotary position embedding. A pair (a, b) with
    /// the angle φ becomes (a cos φ − b sin φ, b cos φ + a sin φ).
    Rope {
        /// No rotation.
        None = "none",
        /// Columns (2p, 2p + 1) are pair p.
        Interleaved = "interleaved",
        /// Columns (p, p + head_dim / 2) are pair p.
        Halves = "halves",
    }
}

choice! {
    /// Angles of a coordinate 1. Half of the n = head_dim / 2 pairs turn by the row of a patch and half by its column;
    /// with i from 0 to n/2 − 1 the number of a pair among those of its axis, they are:
    RopeFrequencies {
        /// θ^(−2i/n), on both axes alike (Qwen2-VL, Kimi's MoonViT, timm's axial rope).
        Axial = "axial",
        /// θ^(−2i/n) for rows and θ^(−(2i + 1)/n) for columns (Pixtral).
        Alternating = "alternating",
        /// 2π θ^(−2i/n): whole turns, for centred coordinates (DINOv3).
        Turns = "turns",
        /// π times n/2 numbers from 1 to `max_frequency` / 2, evenly spaced (timm, `linear_bands`).
        Linear = "linear",
        /// π times n/2 powers of 2 from 1 to `max_frequency` / 2, exponents evenly spaced (timm, `in_pixels`).
        Logarithmic = "logarithmic",
    }
}

choice! {
    /// Which pairs of columns turn by the row of a patch and which by its column.
    RopeOrder {
        /// The first half by the row, the second by the column.
        Rows = "rows",
        /// The first half by the column, the second by the row (timm's `xy`).
        Columns = "columns",
        /// In turn, beginning with the row.
        RowColumn = "row-column",
        /// In turn, beginning with the column (Kimi's MoonViT).
        ColumnRow = "column-row",
    }
}

choice! {
    /// What a coordinate is, for index i of an axis of L patches.
    RopeCoordinate {
        /// i + `offset`.
        Absolute = "absolute",
        /// (i + `offset`) / L times `rows` or `columns` (timm's `ref_feat_shape`).
        Fractional = "fractional",
        /// 2 (i + ½ + `offset`) / L − 1 (DINOv3).
        Centered = "centered",
        /// The same with the longer side of the image for L on both axes.
        CenteredLonger = "centered-longer",
        /// The same with the shorter side.
        CenteredShorter = "centered-shorter",
        /// L numbers from −1 to 1, evenly spaced, −1 where L is 1 (timm, `in_pixels`).
        Ends = "ends",
    }
}

/// Rotary position embedding of queries and keys in every block: kind × frequencies × order × coordinate. Prefix
/// tokens are not turned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RopeConfig {
    /// Which columns are pairs; `none` leaves the embedding out.
    pub kind: Rope,
    /// Angles of a coordinate 1.
    pub frequencies: RopeFrequencies,
    /// Base of the axial, alternating and turns frequencies.
    pub theta: f64,
    /// Twice the largest of the linear and logarithmic frequencies, in half turns.
    pub max_frequency: f64,
    /// Which pairs turn by rows and which by columns.
    pub order: RopeOrder,
    /// What a coordinate is.
    pub coordinate: RopeCoordinate,
    /// What is added to the index of a patch.
    pub offset: f64,
    /// Rows that fractional coordinates run to.
    pub rows: usize,
    /// Columns that fractional coordinates run to.
    pub columns: usize,
}

impl RopeConfig {
    /// The same with defaults for what has no effect.
    pub fn in_effect(&self) -> Self {
        use RopeCoordinate as C;
        use RopeFrequencies as F;
        let default = Self::default();
        if self.kind == Rope::None {
            return default;
        }
        let mut own = self.clone();
        match own.frequencies {
            F::Axial | F::Alternating | F::Turns => own.max_frequency = default.max_frequency,
            F::Linear | F::Logarithmic => own.theta = default.theta,
        }
        if own.coordinate == C::Ends {
            own.offset = default.offset;
        }
        if own.coordinate != C::Fractional {
            (own.rows, own.columns) = (default.rows, default.columns);
        }
        own
    }
}

impl Default for RopeConfig {
    fn default() -> Self {
        Self {
            kind: Rope::None,
            frequencies: RopeFrequencies::Axial,
            theta: 10_000.0,
            max_frequency: 224.0,
            order: RopeOrder::Rows,
            coordinate: RopeCoordinate::Absolute,
            offset: 0.0,
            rows: 16,
            columns: 16,
        }
    }
}
