//! Weights of other implementations: rename tables to this crate's parameter names, and the model
//! settings that reproduce their networks.
//!
//! A file holds names and shapes but not everything that a forward pass needs. What the shapes
//! determine is derived (width, depth, biases, QK-norm, pooling, tables); what they do not
//! (the head count without QK-norm, the kind of GELU, the resampling of positions, norm epsilons) is taken
//! from the configuration.

mod conversion;
mod siglip2;
mod timm;
mod vit_pytorch;

use super::Weights;
use crate::recipe::ModelConfig;
use crate::{Error, Result};
use conversion::Conversion;

/// Converts the weights of a known implementation, recognised by its names, and sets in `model` what
/// they determine. Weights with this crate's names are returned as they are.
///
/// Known are vit-pytorch's NaViT (`na_vit`, `na_vit_nested_tensor`), timm's NaFlexVit and
/// VisionTransformer (also DeiT's own names, LayerScale, and parallel blocks), and transformers'
/// SigLIP 2 vision tower.
///
/// # Errors
/// Names of no known implementation; tensors that are missing, of another shape, or that the
/// implementation's plain form does not have; a head count that must be set.
pub fn detect_and_convert(weights: Weights, model: &mut ModelConfig) -> Result<Weights> {
    let has = |name: &str| weights.tensors.contains_key(name);
    if has("patch_embed.weight") {
        return Ok(weights);
    }
    if has("transformer.layers.0.0.to_kv.weight") {
        return vit_pytorch::packed(Conversion::new("vit-pytorch's NaViT", weights), model);
    }
    if has("transformer.layers.0.0.to_queries.weight") {
        return vit_pytorch::nested(Conversion::new("vit-pytorch's nested-tensor NaViT", weights), model);
    }
    if has("embeds.proj.weight") {
        return timm::naflex(Conversion::new("timm's NaFlexVit", weights), model);
    }
    if has("patch_embed.proj.weight") {
        return timm::plain(Conversion::new("timm's VisionTransformer", weights), model);
    }
    if weights.tensors.keys().any(|name| name.ends_with("embeddings.patch_embedding.weight")) {
        return siglip2::vision(Conversion::new("SigLIP 2's vision tower", weights), model);
    }
    let names: Vec<_> = weights.tensors.keys().take(3).map(String::as_str).collect();
    Err(Error::usage(format!(
        "the tensors ({}, ...) have the names of no known implementation; known are vit-pytorch's NaViT, timm's \
         NaFlexVit and VisionTransformer, DeiT, SigLIP 2's vision tower, and this program's own",
        names.join(", ")
    )))
}
