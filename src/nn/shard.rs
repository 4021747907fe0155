//! What a tensor axis can share out of a model.

use crate::error::Result;
use crate::parallel::mesh::check_divides;
use crate::recipe::ModelConfig;

/// Whether `size` ranks can share heads, the hidden width of the MLP and batches of `tokens` tokens evenly.
///
/// # Errors
/// One message that lists all that they cannot; a model whose shape is invalid.
pub fn check(config: &ModelConfig, tokens: usize, size: usize) -> Result<()> {
    let dims = config.dimensions()?;
    check_divides(size, &[("model.heads", dims.heads), ("model.mlp", dims.mlp), ("packing.tokens", tokens)])
}
