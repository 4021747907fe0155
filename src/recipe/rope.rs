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
