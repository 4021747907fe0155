//! Rotary position embedding (Su et al. 2021), of the rows and columns of an image.
//!
//! Every pair of columns of a head turns by the row or by the column of a patch in its grid. Its angle is the
//! coordinate of the patch, a quotient of two integers where `offset` is one, times the frequency of the pair:
//! [`RopeConfig::coordinate_of`] and [`RopeConfig::pairs`] tell both.

use std::f64::consts::TAU;

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

/// How a pair of columns turns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopePair {
    /// 0: with the row of a patch; 1: with its column.
    pub axis: usize,
    /// Turns of 2π at coordinate 1.
    pub turns: f64,
}

/// Rotary position embedding of queries and keys in every block: kind × frequencies × order × coordinate. Prefix
/// tokens are not turned.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
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
    /// The pairs of a head of `head_dim` columns, a multiple of 4, in order. Of fractional coordinates the grid that they
    /// run to is within the turns.
    pub fn pairs(&self, head_dim: usize) -> Vec<RopePair> {
        let count = head_dim / 4;
        let reach = match self.coordinate {
            RopeCoordinate::Fractional => [self.rows, self.columns].map(|n| n as f64),
            _ => [1.0; 2],
        };
        let pair = |axis: usize, i: usize| RopePair { axis, turns: self.turns(count, axis, i) * reach[axis] };
        let both = (0..count).flat_map(|i| [0, 1].map(|axis| pair(axis, i)));
        let one = |axis: usize| (0..count).map(move |i| pair(axis, i));
        match self.order {
            RopeOrder::Rows => one(0).chain(one(1)).collect(),
            RopeOrder::Columns => one(1).chain(one(0)).collect(),
            RopeOrder::RowColumn => both.collect(),
            RopeOrder::ColumnRow => {
                let mut pairs: Vec<_> = both.collect();
                pairs.chunks_exact_mut(2).for_each(<[RopePair]>::reverse);
                pairs
            }
        }
    }

    /// Turns of pair `i` of the `count` pairs of an axis.
    fn turns(&self, count: usize, axis: usize, i: usize) -> f64 {
        let power = |i: f64| self.theta.powf(-i / count as f64);
        // From 0 to 1.
        let along = i as f64 / (count - 1).max(1) as f64;
        match self.frequencies {
            RopeFrequencies::Axial => power(i as f64) / TAU,
            RopeFrequencies::Alternating => power(i as f64 + 0.5 * axis as f64) / TAU,
            RopeFrequencies::Turns => power(i as f64),
            RopeFrequencies::Linear => 0.5 * (1.0 + along * (0.5 * self.max_frequency - 1.0)),
            RopeFrequencies::Logarithmic => 0.5 * (0.5 * self.max_frequency).powf(along),
        }
    }

    /// Numerator and denominator of the coordinate of index `index` on `axis` of a grid.
    pub fn coordinate_of(&self, axis: usize, index: u16, grid: [u16; 2]) -> [f64; 2] {
        let [index, side] = [index, grid[axis]].map(f64::from);
        let centred = |side: f64| [2.0 * (index + self.offset) + 1.0 - side, side];
        match self.coordinate {
            RopeCoordinate::Absolute => [index + self.offset, 1.0],
            RopeCoordinate::Fractional => [index + self.offset, side],
            RopeCoordinate::Centered => centred(side),
            RopeCoordinate::CenteredLonger => centred(grid[0].max(grid[1]).into()),
            RopeCoordinate::CenteredShorter => centred(grid[0].min(grid[1]).into()),
            RopeCoordinate::Ends if side <= 1.0 => [-1.0, 1.0],
            RopeCoordinate::Ends => [2.0 * index - (side - 1.0), side - 1.0],
        }
    }

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
