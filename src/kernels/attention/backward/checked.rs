//! The checked launch: sizes, strides, alignment and extents are verified before anything is queued.

use half::bf16;

use super::super::checked::{Attention, qk_norm, qk_norm_shapes};
use super::super::lists::Schedule;
use super::plan::BackwardPlan;
use super::raw::{self, AffineGrad, BackwardParams};
use super::workspace::{BackwardSizes, Workspace};
use crate::device::{Buffer, DeviceInfo, Ptr, Stream};
use crate::error::{Error, Result};
use crate::kernels::Element;
use crate::kernels::operand::{Rows, check_len, check_some, check_workspace};
use crate::ops::{QkNormKind, Rope};

/// Operands of the backward pass, of [`bf16`] or [`f16`](half::f16). All are as the forward pass took or wrote them, unless
/// said otherwise.
#[derive(Clone, Copy)]
pub struct Backward<'a, E: Element = bf16> {
    /// `[T, heads·head_dim]`.
    pub q: Rows<'a, E>,
    /// `[T, kv_heads·head_dim]`.
    pub k: Rows<'a, E>,
    /// `[T, kv_heads·head_dim]`.
    pub v: Rows<'a, E>,
    /// `[T, heads·head_dim]`.
    pub out: Rows<'a, E>,
    /// `[T, heads]`.
    pub lse: &'a Buffer<f32>,
    /// Gradient of `out`.
    pub dout: Rows<'a, E>,
    /// γq, βq, γk, βk.
    pub affine: [Option<&'a Buffer<f32>>; 4],
    /// The table of rotary positions.
    pub rope: Option<&'a Buffer<f32>>,
    /// `[N + 1]`.
    pub cu_seqlens: &'a Buffer<i32>,
    /// The lists made from it with the limits of the backward plan.
    pub schedule: &'a Schedule,
    /// Gradient of q, `[T, heads·head_dim]`, all rows written, apart from the operands; likewise the others.
    pub dq: Rows<'a, E>,
    /// Gradient of k, `[T, kv_heads·head_dim]`.
    pub dk: Rows<'a, E>,
    /// Gradient of v, `[T, kv_heads·head_dim]`.
    pub dv: Rows<'a, E>,
    /// Gradients of γq, βq, γk, βk, where they are wanted, written or added to. A config without a norm leaves
    /// them as they are.
    pub daffine: [Option<&'a Buffer<f32>>; 4],
    /// One flag: where it is not 0, `daffine` is added to. None: it is written.
    pub accumulate: Option<&'a Buffer<i32>>,
    /// At least [`Attention::backward_workspace_bytes`].
    pub workspace: &'a Buffer<u8>,
}

impl Attention {
    /// Verifies the sizes, and plans the backward pass for a device.
    ///
    /// # Errors
    /// As for [`plan`](Self::plan).
    pub fn backward_plan(&self, device: &DeviceInfo) -> Result<BackwardPlan> {
        self.check()?;
        let head_dim = self.config.head_dim;
        BackwardPlan::new(head_dim, device).ok_or_else(|| {
            Error::usage(format!(
                "{} has {} bytes of shared memory for a block, too few for the backward pass of attention with \
                 a head dim of {head_dim}; use the CPU device",
                device.name, device.shared_per_block
            ))
        })
    }

    /// Bytes of workspace of the backward pass over schedules that were promised images of at most `longest` rows;
    /// `affine` tells whether gradients of gains or biases are wanted.
    pub fn backward_workspace_bytes(&self, plan: &BackwardPlan, longest: usize, affine: bool) -> usize {
        plan.workspace(&self.backward_sizes(longest, affine)).bytes
    }

    /// What such a pass is made for.
    pub fn backward_sizes(&self, longest: usize, affine: bool) -> BackwardSizes {
        BackwardSizes {
            tokens: self.tokens,
            slots: self.slots,
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
            longest: longest.min(self.tokens),
            norm: self.config.norm != QkNormKind::None,
            rope: self.config.rope != Rope::None,
            affine,
        }
    }

    /// Verifies the operands and queues the backward pass.
    ///
    /// # Errors
    /// Anything that is not as the fields of [`Attention`] and [`Backward`] say, or a plan that is not of
    /// this head dim and of the schedule's limits; what the device refuses.
    pub fn backward<E: Element>(
        &self,
        stream: &Stream,
        plan: &BackwardPlan,
        operands: &Backward<'_, E>,
    ) -> Result<()> {
        self.check()?;
        self.check_schedule(plan.instance.width, plan.limits, operands.schedule)?;
        let device = stream.device().info();
        if plan.instance.hopper && (!device.hopper || device.shared_per_block < plan.shared) {
            return Err(Error::usage(format!(
                "the plan of the backward pass of attention is for Hopper, which {} is not; make it for the device",
                device.name
            )));
        }
        let affine = self.affine_grad(operands)?;
        let wanted = operands.daffine.iter().any(Option::is_some);
        let workspace = plan.workspace(&self.backward_sizes(operands.schedule.longest(), wanted));
        let base = check_workspace(operands.workspace, workspace.bytes)?;
        let params = self.backward_params(plan, operands, &workspace, base)?;
        let (kernels, stream) = (stream.device().kernels(), stream.raw());
        // SAFETY: every operand was found to be as large as the kernels take it to be.
        unsafe { raw::backward(kernels, stream, plan, &params, &workspace, base, &affine) }
    }

    fn affine_grad<E: Element>(&self, operands: &Backward<'_, E>) -> Result<AffineGrad> {
        let [q_gain, q_bias, k_gain, k_bias] = operands.daffine;
        let [q, k] = &qk_norm_shapes(&self.config);
        Ok(AffineGrad {
            q_gain: check_some("the gradient of the gain of q", q_gain, q)?,
            q_bias: check_some("the gradient of the bias of q", q_bias, q)?,
            k_gain: check_some("the gradient of the gain of k", k_gain, k)?,
            k_bias: check_some("the gradient of the bias of k", k_bias, k)?,
            accumulate: check_some("the flag of accumulation", operands.accumulate, &[1])?,
        })
    }

    fn backward_params<E: Element>(
        &self,
        plan: &BackwardPlan,
        operands: &Backward<'_, E>,
        workspace: &Workspace,
        base: Ptr<u8>,
    ) -> Result<BackwardParams<E>> {
        let Self { config, tokens, slots, .. } = *self;
        let (width, kv_width) = (config.heads * config.head_dim, config.kv_width());
        let rows = |name, rows: &Rows<'_, E>, width| rows.check(name, tokens, width);
        let (rope, rope_kind) = self.rope(operands.rope)?;
        let affine = config.norm != QkNormKind::None && operands.daffine.iter().any(Option::is_some);
        Ok(BackwardParams {
            q: rows("q", &operands.q, width)?,
            k: rows("k", &operands.k, kv_width)?,
            v: rows("v", &operands.v, kv_width)?,
            out: rows("out", &operands.out, width)?,
            dout: rows("dout", &operands.dout, width)?,
            dq: rows("dq", &operands.dq, width)?,
            dk: rows("dk", &operands.dk, kv_width)?,
            dv: rows("dv", &operands.dv, kv_width)?,
            lse: check_len("lse", operands.lse, &[tokens, config.heads])?,
            delta: base.cast(),
            partial: if affine { workspace.partial(base) } else { Ptr::null() },
            cu_seqlens: operands.schedule.starts(operands.cu_seqlens)?,
            schedule: operands.schedule.words(),
            rope,
            norm: qk_norm(&config, operands.affine)?,
            q_stride: operands.q.stride as i64,
            k_stride: operands.k.stride as i64,
            v_stride: operands.v.stride as i64,
            out_stride: operands.out.stride as i64,
            dout_stride: operands.dout.stride as i64,
            dq_stride: operands.dq.stride as i64,
            dk_stride: operands.dk.stride as i64,
            dv_stride: operands.dv.stride as i64,
            tokens: tokens as i32,
            slots: slots as i32,
            heads: config.heads as i32,
            kv_heads: config.kv_heads as i32,
            head_dim: config.head_dim as i32,
            short_rows: plan.short_rows as i32,
            tile_rows: plan.limits.tile_rows as i32,
            rope_kind,
            unused: 0,
            scale: config.scale as f32,
        })
    }
}
