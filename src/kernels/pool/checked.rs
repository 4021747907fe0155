//! Checked launches of masked attention pooling: learned queries, the same for all images, ask the tokens of
//! each image.

use half::bf16;

use super::PackedSizes;
use super::attention::{
    AttentionBackwardParams, AttentionForwardParams, AttentionQuery, AttentionShape, MAX_HEAD_DIM,
    MAX_QUERIES, launch_attention_backward, launch_attention_forward,
};
use crate::device::{Buffer, Ptr, Stream};
use crate::error::{Error, Result};
use crate::kernels::operand::{Rows, check_cu_seqlens, check_len, check_some, check_workspace};
use crate::ops::{AttentionConfig, QkNormKind};

/// The query of a checked launch.
#[derive(Clone, Copy)]
pub enum Query<'a> {
    /// An activation.
    Bf16(&'a Buffer<bf16>),
    /// A parameter.
    F32(&'a Buffer<f32>),
}

/// Masked attention pooling of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionPool {
    /// Heads, head dim, scale and norm.
    pub config: AttentionConfig,
    /// The batch.
    pub sizes: PackedSizes,
    /// Queries.
    pub queries: usize,
}

/// Operands of the forward pass.
#[derive(Clone, Copy)]
pub struct AttentionForward<'a> {
    /// `[queries, heads·head_dim]`.
    pub q: Query<'a>,
    /// `[T, heads·head_dim]`.
    pub k: Rows<'a, bf16>,
    /// `[T, heads·head_dim]`.
    pub v: Rows<'a, bf16>,
    /// γq, βq, γk, βk, `[heads, head_dim]` or `[head_dim]` as the config says; missing is 1 or 0. A config
    /// without a norm ignores them.
    pub affine: [Option<&'a Buffer<f32>>; 4],
    /// `[images + 1]`.
    pub cu_seqlens: &'a Buffer<i32>,
    /// The host's copy of it, where there is one: it is verified before anything is queued.
    pub cu_seqlens_host: Option<&'a [i32]>,
    /// One word that the device sets where it refuses `cu_seqlens`, and which is 0 before; see [`fault`](super::fault).
    pub error: Option<&'a Buffer<i32>>,
    /// `[images, queries, heads·head_dim]`.
    pub out: &'a Buffer<bf16>,
    /// `[images, queries, heads]`.
    pub lse: &'a Buffer<f32>,
}

/// Operands of the backward pass besides those of the forward pass.
#[derive(Clone, Copy)]
pub struct AttentionBackward<'a> {
    /// `[images, queries, heads·head_dim]`.
    pub dout: &'a Buffer<bf16>,
    /// `[T, heads·head_dim]`, all rows written.
    pub dk: Rows<'a, bf16>,
    /// `[T, heads·head_dim]`, all rows written.
    pub dv: Rows<'a, bf16>,
    /// Gradient of the query, written.
    pub dq: Option<&'a Buffer<bf16>>,
    /// Gradient of the query, written or added to.
    pub dq_f32: Option<&'a Buffer<f32>>,
    /// Gradients of γq, βq, γk, βk, written or added to. A config without a norm leaves them as they are.
    pub daffine: [Option<&'a Buffer<f32>>; 4],
    /// One flag: whether f32 gradients are added to. None: they are written.
    pub accumulate: Option<&'a Buffer<i32>>,
}

impl AttentionPool {
    /// The constants of the kernels.
    ///
    /// # Errors
    /// An unsupported head dim or number of queries, sizes beyond what the kernels count with.
    pub fn shape(&self) -> Result<AttentionShape> {
        let Self { config, sizes, queries } = self;
        sizes.check()?;
        if config.head_dim == 0 || config.head_dim > MAX_HEAD_DIM || !config.head_dim.is_multiple_of(8) {
            return Err(Error::usage(format!(
                "attention pooling has a head dim of {}, expected a multiple of 8 to {MAX_HEAD_DIM}",
                config.head_dim
            )));
        }
        if *queries == 0 || *queries > MAX_QUERIES {
            return Err(Error::usage(format!(
                "attention pooling has {queries} queries, expected 1 to {MAX_QUERIES}"
            )));
        }
        if config.heads == 0 || config.heads > 4096 {
            return Err(Error::usage(format!(
                "attention pooling has {} heads, expected 1 to 4096",
                config.heads
            )));
        }
        Ok(AttentionShape {
            scale: config.scale as f32,
            eps: config.eps as f32,
            tokens: sizes.tokens as i32,
            images: sizes.images as i32,
            heads: config.heads as i32,
            head_dim: config.head_dim as i32,
            queries: *queries as i32,
            skip: sizes.skip as i32,
            norm: match config.norm {
                QkNormKind::None => 0,
                QkNormKind::Rms => 1,
                QkNormKind::LayerNorm | QkNormKind::LayerNormBias => 2,
            },
            per_head: i32::from(config.gain_per_head),
        })
    }

    fn width(&self) -> usize {
        self.config.heads * self.config.head_dim
    }

    /// Gains, biases or their gradients; null without a norm.
    fn affine(&self, buffers: [Option<&Buffer<f32>>; 4], grad: &str) -> Result<[Ptr<f32>; 4]> {
        let shape: &[usize] = match self.config.gain_per_head {
            true => &[self.config.heads, self.config.head_dim],
            false => &[self.config.head_dim],
        };
        let mut addresses = [Ptr::null(); 4];
        if self.config.norm != QkNormKind::None {
            let names = ["q_gain", "q_bias", "k_gain", "k_bias"];
            for ((address, buffer), name) in addresses.iter_mut().zip(buffers).zip(names) {
                *address = check_some(&format!("{grad}{name}"), buffer, shape)?;
            }
        }
        Ok(addresses)
    }

    fn forward_params(&self, args: &AttentionForward<'_>) -> Result<AttentionForwardParams> {
        let PackedSizes { tokens, images, .. } = self.sizes;
        let shape = self.shape()?;
        let width = self.width();
        if let Some(host) = args.cu_seqlens_host {
            check_cu_seqlens(host, images, tokens)?;
        }
        let (q, q_f32) = match args.q {
            Query::Bf16(q) => (check_len("q", q, &[self.queries, width])?, Ptr::null()),
            Query::F32(q) => (Ptr::null(), check_len("q", q, &[self.queries, width])?),
        };
        let [q_gain, q_bias, k_gain, k_bias] = self.affine(args.affine, "")?;
        Ok(AttentionForwardParams {
            out: check_len("out", args.out, &[images, self.queries, width])?,
            lse: check_len("lse", args.lse, &[images, self.queries, self.config.heads])?,
            partial: Ptr::null(),
            k: args.k.check("k", tokens, width)?,
            v: args.v.check("v", tokens, width)?,
            query: AttentionQuery { q, q_f32, q_gain, q_bias, k_gain, k_bias },
            cu_seqlens: check_len("cu_seqlens", args.cu_seqlens, &[images + 1])?,
            error: check_some("error", args.error, &[1])?,
            k_stride: args.k.stride as i64,
            v_stride: args.v.stride as i64,
            shape,
        })
    }

    /// Queues `out` and `lse`; the workspace has [`AttentionShape::forward_workspace_bytes`].
    ///
    /// # Errors
    /// What [`shape`](Self::shape) refuses, buffers of another size, rows that are not aligned, a
    /// `cu_seqlens` that decreases or overruns, a launch that the device refuses.
    pub fn forward(
        &self,
        stream: &Stream,
        args: &AttentionForward<'_>,
        workspace: &Buffer<u8>,
    ) -> Result<()> {
        let mut params = self.forward_params(args)?;
        params.partial = check_workspace(workspace, params.shape.forward_workspace_bytes())?.cast();
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_attention_forward(stream.device().kernels(), stream.raw(), &params) }
    }

    /// Queues the gradients; the workspace has [`AttentionShape::backward_workspace_bytes`].
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn backward(
        &self,
        stream: &Stream,
        forward: &AttentionForward<'_>,
        args: &AttentionBackward<'_>,
        workspace: &Buffer<u8>,
    ) -> Result<()> {
        let PackedSizes { tokens, images, .. } = self.sizes;
        let width = self.width();
        let forward = self.forward_params(forward)?;
        let shape = forward.shape;
        let [dq_gain, dq_bias, dk_gain, dk_bias] = self.affine(args.daffine, "d")?;
        let partial: Ptr<f32> = check_workspace(workspace, shape.backward_workspace_bytes())?.cast();
        let params = AttentionBackwardParams {
            dk: args.dk.check("dk", tokens, width)?,
            dv: args.dv.check("dv", tokens, width)?,
            partial,
            sums: partial.offset(shape.backward_partial_len()),
            dout: check_len("dout", args.dout, &[images, self.queries, width])?,
            out: forward.out,
            lse: forward.lse,
            k: forward.k,
            v: forward.v,
            query: forward.query,
            dq: check_some("dq", args.dq, &[self.queries, width])?,
            dq_f32: check_some("dq_f32", args.dq_f32, &[self.queries, width])?,
            dq_gain,
            dq_bias,
            dk_gain,
            dk_bias,
            accumulate: check_some("accumulate", args.accumulate, &[1])?,
            cu_seqlens: forward.cu_seqlens,
            error: forward.error,
            dk_stride: args.dk.stride as i64,
            dv_stride: args.dv.stride as i64,
            k_stride: forward.k_stride,
            v_stride: forward.v_stride,
            shape,
        };
        // SAFETY: the operands are live buffers of the checked sizes; the stream orders their later use.
        unsafe { launch_attention_backward(stream.device().kernels(), stream.raw(), &params) }
    }
}
