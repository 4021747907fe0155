//! The Vision Transformer of every recipe: plain ViT, NaViT, DeiT III, ViT-22B.

use crate::autograd::graph::{Graph, Init, ParamSpec, Tensor};
use crate::autograd::position::rope::rope_table;
use crate::autograd::{elementwise, gemm, patch, sharded};
use crate::error::Result;
use crate::nn::{block, norm, patch_embed, pool, position, shard};
use crate::recipe::shapes::Dimensions;
use crate::recipe::{ModelConfig, Recipe, Recompute};

/// What a recorded model computes.
#[derive(Clone, Copy, Debug)]
pub struct Outputs {
    /// `[T, D]` tokens after the last norm, prefix tokens included.
    pub tokens: Tensor,
    /// `[N, D]` pooled vectors, what the head sees.
    pub features: Tensor,
    /// `[N, classes]`.
    pub logits: Tensor,
}

/// Records the model of `recipe` for batches of `tokens` tokens and `slots` images. `training`
/// turns stochastic depth and recomputation on. Of a graph with a tensor axis, the blocks are shared
/// out; what comes before and after them is small, and every rank computes it whole.
///
/// # Errors
/// If the shape is unknown or does not divide into heads, or cannot be shared out.
pub fn record(
    graph: &mut Graph,
    recipe: &Recipe,
    classes: usize,
    tokens: usize,
    slots: usize,
    training: bool,
) -> Result<Outputs> {
    let config = &recipe.model;
    let (x, features) = tower(graph, recipe, tokens, slots, training)?;
    let width = graph.info(features).cols;
    let weight = graph.param(ParamSpec {
        name: "head.weight".into(),
        shape: vec![classes, width],
        init: Init::TruncatedNormal(0.02),
        decay: true,
        head: true,
    });
    let bias = config.head_bias.then(|| {
        graph.param(ParamSpec {
            name: "head.bias".into(),
            shape: vec![classes],
            init: Init::Constant(config.head_init_bias as f32),
            decay: false,
            head: true,
        })
    });
    let logits = gemm::linear(graph, features, weight, bias);
    Ok(Outputs { tokens: x, features, logits })
}

/// All of it but the head: tokens `[T, D]` and pooled vectors `[N, D]`.
///
/// # Errors
/// As for [`record`].
pub fn tower(
    graph: &mut Graph,
    recipe: &Recipe,
    tokens: usize,
    slots: usize,
    training: bool,
) -> Result<(Tensor, Tensor)> {
    let config = &recipe.model;
    let dims = config.dimensions()?;
    shard::check(config, tokens, graph.shard().size)?;
    let patch_dim = config.patch_dim();
    let patches = patch::patches(graph, tokens, patch_dim, &recipe.data.mean, &recipe.data.std);
    let mut x = patch_embed::patch_embed(graph, patches, config, &dims);
    if let Some(position) = position::position_embedding(graph, tokens, config, &dims) {
        x = elementwise::add(graph, x, position);
    }
    if config.prefix() > 0 {
        let prefix = graph.param(ParamSpec {
            name: "prefix".into(),
            shape: vec![config.prefix(), dims.width],
            init: Init::TruncatedNormal(0.02),
            decay: false,
            head: false,
        });
        x = patch::write_prefix(graph, x, prefix);
    }
    let rope = rope_table(graph, tokens, dims.head_dim, &config.rope);
    let shared_out = graph.shard().is_part();
    if shared_out {
        x = sharded::own_rows(graph, x);
    }
    x = blocks(graph, x, rope, config, &dims, training);
    if shared_out {
        x = sharded::all_rows(graph, x);
    }
    let mut features = pool::pool(graph, x, slots, config, &dims);
    if config.head_norm {
        features = norm::layer(graph, "head_norm", features, config);
    }
    Ok((x, features))
}

/// All blocks and the last norm over tokens `[T, D]`.
pub fn blocks(
    graph: &mut Graph,
    mut x: Tensor,
    rope: Option<Tensor>,
    config: &ModelConfig,
    dims: &Dimensions,
    training: bool,
) -> Tensor {
    let recompute = if training { config.recompute } else { Recompute::None };
    if recompute == Recompute::Selective {
        graph.recompute_cheap();
    }
    for index in 0..dims.depth {
        if recompute == Recompute::Full {
            graph.begin_segment();
        }
        x = block::block(graph, index, x, rope, config, dims, training);
        if recompute == Recompute::Full {
            graph.end_segment();
        }
    }
    match config.final_norm {
        true => norm::layer(graph, "norm", x, config),
        false => x,
    }
}
