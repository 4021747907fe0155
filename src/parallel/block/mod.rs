//! A tensor-parallel Transformer block on the CPU device.
//!
//! Heads and the hidden width of the MLP are shared out by features; between them every rank has all features of
//! some tokens, so that norms, LayerScale and residual connections are local (sequence parallelism). What enters
//! attention and the MLP is gathered into the product, what leaves them is reduced out of it ([`ShardedLinear`]);
//! nothing else is sent but one sum of the gradients of gains and biases that all ranks hold.
//!
//! | block | forward | backward |
//! |---|---|---|
//! | serial | 2 gathers, 2 reduce-scatters | 4 gathers, 2 reduce-scatters |
//! | parallel | 1 gather, 1 reduce-scatter | 2 gathers, 1 reduce-scatter |
//! | parallel with LayerScale | 1 gather, 2 reduce-scatters | 3 gathers, 1 reduce-scatter |
//!
//! In a parallel block (ViT-22B) queries, keys, values and the first layer of the MLP are one product, and so are
//! the projection of attention and the second layer, unless LayerScale needs their results apart.

mod backward;
mod fused;
mod params;

pub use params::{Split, Tensors};

use bytemuck::Pod;

use super::collectives::part_of;
use super::group::Group;
use super::linear::{Layout, ShardedLinear};
use super::mesh::check_divides;
use super::ring::{Rings, Sharding};
use crate::cpu::attention::{AttentionConfig, QkAffine};
use crate::cpu::real::Real;
use crate::cpu::{attention, gemm, norm, residual};
use crate::error::Result;
use crate::nn::attention::attention_config;
use crate::recipe::shapes::Dimensions;
use crate::recipe::{BlockKind, ModelConfig};

/// A block shared out over a group.
#[derive(Clone, Debug)]
pub struct ShardedBlock {
    config: ModelConfig,
    width: usize,
    size: usize,
    /// Of this rank's heads.
    attention: AttentionConfig,
    /// Outputs of this rank's queries, keys and values, and of its first layer of the MLP.
    qkv_width: usize,
    mlp_width: usize,
    /// Queries, keys, values; in a parallel block, the first layer of the MLP as well.
    qkv: ShardedLinear,
    /// The first layer of the MLP of a serial block.
    fc1: Option<ShardedLinear>,
    /// The projection of attention; in a parallel block without LayerScale, the second layer as well.
    proj: ShardedLinear,
    /// The second layer of the MLP where it is not one product with the projection.
    fc2: Option<ShardedLinear>,
}

/// What a block must know of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a, R> {
    /// Starts of the images, those of the used slots and their end.
    pub cu_seqlens: &'a [i32],
    /// Drop-path factors of both branches, one for each of this rank's tokens; absent ones are 1. In a parallel
    /// block the first serves both.
    pub keep: [Option<&'a [R]>; 2],
}

/// What the forward pass leaves for the backward pass.
#[derive(Debug)]
pub struct Saved<R> {
    x: Vec<R>,
    /// Normalised x, and its statistics.
    y1: Vec<R>,
    stats1: Vec<R>,
    qkv: Vec<R>,
    attended: Vec<R>,
    lse: Vec<R>,
    /// Result of the attention branch where it is one of its own, and the residual stream after it.
    branch1: Vec<R>,
    x1: Vec<R>,
    /// Of the second norm, in a serial block.
    y2: Vec<R>,
    stats2: Vec<R>,
    /// Hidden layer of the MLP before and after GELU.
    pre: Vec<R>,
    hidden: Vec<R>,
    branch2: Vec<R>,
}

impl ShardedBlock {
    /// The block of `config` and `dims` on `size` ranks.
    ///
    /// # Errors
    /// Where heads or the hidden width of the MLP do not divide by `size`: one message with all that do not.
    pub fn new(config: &ModelConfig, dims: &Dimensions, rings: Rings, size: usize) -> Result<Self> {
        check_divides(size, &[("heads", dims.heads), ("MLP width", dims.mlp)])?;
        let inner = dims.heads * dims.head_dim;
        let linear = |sharding, widths| ShardedLinear::new(sharding, Layout::Tokens, rings, widths, size);
        let (row, column) = (Sharding::Row, Sharding::Column);
        let serial = config.block == BlockKind::Serial;
        let beside = |apart| if apart { 0 } else { dims.mlp };
        let apart = serial || config.layer_scale > 0.0;
        let mine = Dimensions { heads: dims.heads / size, ..*dims };
        Ok(Self {
            config: config.clone(),
            width: dims.width,
            size,
            attention: attention_config(config, &mine, config.qk_norm),
            qkv_width: 3 * inner / size,
            mlp_width: dims.mlp / size,
            qkv: linear(row, [dims.width, 3 * inner + beside(serial)])?,
            fc1: serial.then(|| linear(row, [dims.width, dims.mlp])).transpose()?,
            proj: linear(column, [inner + beside(apart), dims.width])?,
            fc2: apart.then(|| linear(column, [dims.mlp, dims.width])).transpose()?,
        })
    }

    /// How the parameter `name` is shared out.
    pub fn split(&self, name: &str) -> Split {
        Split::of(name, self.config.qk_norm_per_head)
    }

    /// Elements that rank `rank` sends in the forward pass of `tokens` tokens.
    pub fn forward_volume(&self, rank: usize, tokens: usize) -> u64 {
        self.layers().map(|layer| layer.forward_volume(rank, tokens).iter().sum::<u64>()).sum()
    }

    /// Elements that rank `rank` sends in the backward pass, where `shared` elements of gradients are summed.
    pub fn backward_volume(&self, rank: usize, tokens: usize, shared: usize) -> u64 {
        let part = part_of(shared, self.size, rank).len();
        let sum = (shared - part + (self.size - 1) * part) as u64;
        let layers = self.layers().map(|layer| layer.backward_volume(rank, tokens, false));
        layers.map(|sent| sent.iter().sum::<u64>()).sum::<u64>() + sum
    }

    fn layers(&self) -> impl Iterator<Item = &ShardedLinear> {
        [&self.qkv, &self.proj].into_iter().chain(&self.fc1).chain(&self.fc2)
    }

    /// This rank's rows of the block's result, from its rows `x` of the residual stream. Rows of padding become
    /// zeros.
    ///
    /// # Errors
    /// Those of [`ShardedLinear::forward`].
    ///
    /// # Panics
    /// If a parameter is missing or a slice has another length than its shape: a bug of the caller, not of a
    /// user.
    pub fn forward<R: Real + Pod>(
        &self,
        group: &Group,
        x: &[R],
        params: &Tensors<R>,
        batch: &Packed<'_, R>,
    ) -> Result<(Vec<R>, Saved<R>)> {
        let rows = x.len() / self.width;
        let tokens = rows * self.size;
        let linear = |layer: &ShardedLinear, x: &[R], weight: &[R], bias: Option<&[R]>| {
            let [rows, cols] = layer.output_shape(tokens);
            let mut y = vec![R::ZERO; rows * cols];
            layer.forward(group, &mut y, None, x, weight, bias)?;
            Ok(y)
        };
        let named = |layer: &ShardedLinear, name: &str, x: &[R]| -> Result<Vec<R>> {
            let bias = optional(params, &format!("{name}.bias"));
            linear(layer, x, needed(params, &format!("{name}.weight")), bias)
        };

        let (y1, stats1) = self.norm("norm1", x, params);
        let (qkv, beside) = match &self.fc1 {
            Some(_) => (named(&self.qkv, "attn.qkv", &y1)?, None),
            None => {
                let bias = self.input_bias(params);
                let both = linear(&self.qkv, &y1, &fused::input_weight(params), bias.as_deref())?;
                let (qkv, pre) = fused::split_columns(&both, [self.qkv_width, self.mlp_width]);
                (qkv, Some(pre))
            }
        };
        let heads = self.attention.heads;
        let mut attended = vec![R::ZERO; tokens * heads * self.attention.head_dim];
        let mut lse = vec![R::ZERO; tokens * heads];
        let affine = affine(params);
        attention::forward(&self.attention, &mut attended, &mut lse, &qkv, affine, batch.cu_seqlens);
        let mut x1 = x.to_vec();
        let mut branch1 = Vec::new();
        if self.fc2.is_some() {
            branch1 = named(&self.proj, "attn.proj", &attended)?;
            residual::forward(&mut x1, &branch1, optional(params, "scale1"), batch.keep[0], self.width);
        }

        let (y2, stats2, pre) = match (&self.fc1, beside) {
            (Some(fc1), _) => {
                let (y2, stats2) = self.norm("norm2", &x1, params);
                let pre = named(fc1, "mlp.fc1", &y2)?;
                (y2, stats2, pre)
            }
            (None, beside) => (Vec::new(), Vec::new(), beside.unwrap_or_default()),
        };
        let mut hidden = vec![R::ZERO; pre.len()];
        gemm::gelu(&mut hidden, &pre, self.config.gelu);
        let branch2 = match &self.fc2 {
            Some(fc2) => named(fc2, "mlp.fc2", &hidden)?,
            None => {
                let both = fused::join_columns(&attended, &hidden, self.output_widths());
                let (weight, bias) = (self.output_weight(params), fused::output_bias(params));
                linear(&self.proj, &both, &weight, bias.as_deref())?
            }
        };
        let mut out = x1.clone();
        residual::forward(
            &mut out,
            &branch2,
            optional(params, "scale2"),
            self.second_keep(batch),
            self.width,
        );
        self.clear_padding(group, &mut out, batch);
        let saved = Saved {
            x: x.to_vec(),
            y1,
            stats1,
            qkv,
            attended,
            lse,
            branch1,
            x1,
            y2,
            stats2,
            pre,
            hidden,
            branch2,
        };
        Ok((out, saved))
    }

    fn norm<R: Real>(&self, name: &str, x: &[R], params: &Tensors<R>) -> (Vec<R>, Vec<R>) {
        let (mut y, mut stats) = (vec![R::ZERO; x.len()], vec![R::ZERO; 2 * x.len() / self.width]);
        let gain = Some(needed(params, &format!("{name}.gain")));
        let bias = optional(params, &format!("{name}.bias"));
        norm::forward(&mut y, &mut stats, x, gain, bias, self.width, self.config.norm, self.config.norm_eps);
        (y, stats)
    }

    /// Zeros where this rank's rows lie beyond the last image.
    fn clear_padding<R: Real>(&self, group: &Group, rows: &mut [R], batch: &Packed<'_, R>) {
        let live = batch.cu_seqlens.last().map_or(0, |&end| end as usize);
        let first = group.rank() * rows.len() / self.width;
        let mine = live.saturating_sub(first) * self.width;
        let padding = mine.min(rows.len());
        rows[padding..].fill(R::ZERO);
    }

    /// Drop-path factors of the second branch: a parallel block keeps or drops both together.
    fn second_keep<'a, R>(&self, batch: &Packed<'a, R>) -> Option<&'a [R]> {
        batch.keep[usize::from(self.fc1.is_some())]
    }
}

fn optional<'a, R>(params: &'a Tensors<R>, name: &str) -> Option<&'a [R]> {
    params.get(name).map(Vec::as_slice)
}

fn needed<'a, R>(params: &'a Tensors<R>, name: &str) -> &'a [R] {
    optional(params, name).unwrap_or_else(|| panic!("parameter {name} of the block is missing"))
}

fn affine<R>(params: &Tensors<R>) -> QkAffine<'_, R> {
    QkAffine {
        q_gain: optional(params, "attn.q_norm.gain"),
        k_gain: optional(params, "attn.k_norm.gain"),
        q_bias: optional(params, "attn.q_norm.bias"),
        k_bias: optional(params, "attn.k_norm.bias"),
    }
}
