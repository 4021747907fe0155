//! What a tensor axis can share out of a model.

use crate::error::Result;
use crate::parallel::mesh::check_divides;
use crate::recipe::ModelConfig;

/// Whether `size` ranks can share query and kv heads, the hidden width of the MLP and batches of `tokens` tokens evenly.
///
/// # Errors
/// One message that lists all that they cannot; a model whose shape is invalid.
pub fn check(config: &ModelConfig, tokens: usize, size: usize) -> Result<()> {
    let dims = config.dimensions()?;
    let heads = [("model.heads", dims.heads), ("model.kv_heads", dims.kv_heads)];
    // Where every head has its own keys and values there is no such number in the recipe.
    let heads = if dims.kv_heads == dims.heads { &heads[..1] } else { &heads[..] };
    check_divides(size, &[heads, &[("model.mlp", dims.mlp), ("packing.tokens", tokens)]].concat())
}
