//! An image tower and a text tower, whose vectors are compared (CLIP, LiT, SigLIP; NaViT, section 3.1).

use crate::autograd::contrastive::{self, ContrastiveLoss};
use crate::autograd::graph::{Graph, Init, Modality, ParamSpec, Tensor, Tower};
use crate::autograd::position;
use crate::error::Result;
use crate::models::vit;
use crate::nn::linear::linear;
use crate::nn::pool;
use crate::recipe::{ContrastiveKind, Recipe};

/// What both towers compute.
#[derive(Clone, Copy, Debug)]
pub struct Towers {
    /// `[N, D]` pooled vectors of the images.
    pub images: Tensor,
    /// `[N, D]` vectors of the texts, of the width of the images'.
    pub texts: Tensor,
    /// `[1]`, parameter: the logarithm of the factor on the cosines.
    pub scale: Tensor,
    /// `[1]`, parameter: what is added to the scores, with the sigmoid loss.
    pub bias: Option<Tensor>,
}

impl Towers {
    /// Those of one modality.
    pub fn of(&self, modality: Modality) -> Tensor {
        match modality {
            Modality::Images => self.images,
            Modality::Texts => self.texts,
        }
    }
}

/// Name of the parameter that holds the logarithm of the factor.
pub const SCALE: &str = "contrastive.scale";
/// Name of the bias on the scores.
pub const BIAS: &str = "contrastive.bias";

/// Records both towers of `recipe` for batches of `tokens` image tokens and `slots` pairs. Training, a locked image
/// tower is recorded as in an evaluation.
///
/// # Errors
/// If a shape is unknown or does not divide into heads; a vocabulary that is not known.
pub fn record(
    graph: &mut Graph,
    recipe: &Recipe,
    tokens: usize,
    slots: usize,
    training: bool,
) -> Result<Towers> {
    let locked = recipe.contrastive.lock_image;
    graph.begin_tower(Tower { modality: Modality::Images, frozen: locked });
    let (_, images) = vit::tower(graph, recipe, tokens, slots, training && !locked)?;
    graph.begin_tower(Tower { modality: Modality::Texts, frozen: false });
    let width = graph.info(images).cols;
    let texts = text_tower(graph, recipe, width, slots, training)?;
    graph.begin_tower(Tower::default());
    let mut scalar = |name: &str, value: f64| {
        graph.param(ParamSpec {
            name: name.into(),
            shape: vec![1],
            init: Init::Constant(value as f32),
            decay: false,
            head: false,
        })
    };
    let contrastive = &recipe.contrastive;
    let scale = scalar(SCALE, libm::log(contrastive.init_factor));
    let bias = (contrastive.loss == ContrastiveKind::Sigmoid).then(|| scalar(BIAS, contrastive.init_bias));
    Ok(Towers { images, texts, scale, bias })
}

/// `[slots, width]`: token and place embedding, blocks, attention pooling, a linear layer.
fn text_tower(
    graph: &mut Graph,
    recipe: &Recipe,
    width: usize,
    slots: usize,
    training: bool,
) -> Result<Tensor> {
    let config = recipe.text_model()?;
    let dims = config.dimensions()?;
    let mut table = |name: &str, rows: usize| {
        graph.param(ParamSpec {
            name: name.into(),
            shape: vec![rows, dims.width],
            init: Init::Normal(0.02),
            decay: false,
            head: false,
        })
    };
    let tables =
        vec![table("embed.token", config.position.rows), table("embed.place", config.position.columns)];
    let tokens = recipe.text_tokens(slots);
    let x = position::position(graph, tokens, dims.width, &config.position, tables);
    let x = vit::blocks(graph, x, None, &config, &dims, training);
    let x = pool::pool(graph, x, slots, &config, &dims);
    Ok(linear(graph, "projection", x, width, false))
}

/// Records the loss of the towers and the backward pass.
pub fn learn(graph: &mut Graph, towers: &Towers, recipe: &Recipe) -> ContrastiveLoss {
    let Towers { images, texts, scale, bias } = *towers;
    let loss = contrastive::contrastive(graph, images, texts, scale, bias, recipe.contrastive.loss);
    let mut roots = vec![(images, loss.dimages), (texts, loss.dtexts), (scale, loss.dscale)];
    roots.extend(bias.zip(loss.dbias));
    graph.backward(&roots);
    loss
}
