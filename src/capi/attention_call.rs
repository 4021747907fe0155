//! Packed attention: from the numbers and addresses of a caller to checked launches.

use std::ffi::c_void;

use super::attention::{Attention, AttentionSizes, Rope};
use super::handle::{Handle, device};
use super::operands::{Lines, Memory, count, host_starts};
use super::status::{Refusal, Result};
use super::structs::read;
use super::{Dtype, QkNorm};
use crate::device::{Buffer, Device, Stream};
use crate::kernels::Element;
use crate::kernels::attention::{
    Attention as Checked, Backward, BackwardPlan, Forward, ForwardPlan, Limits, Schedule, Statistics,
};
use crate::ops::{AttentionConfig, QkNormKind, Rope as CheckedRope};

/// What becomes of the numbers of a call on a device.
pub(super) struct Call {
    pub(super) device: Device,
    given: Attention,
    checked: Checked,
    /// Whether elements are f16, or else bf16.
    pub(super) half: bool,
    longest: usize,
    forward: ForwardPlan,
    backward: BackwardPlan,
}

/// The norm of a number.
pub(super) fn norm_of(operation: &str, number: u32) -> Result<QkNormKind> {
    match number {
        n if n == QkNorm::None as u32 => Ok(QkNormKind::None),
        n if n == QkNorm::Rms as u32 => Ok(QkNormKind::Rms),
        n if n == QkNorm::LayerNorm as u32 => Ok(QkNormKind::LayerNormBias),
        other => {
            Err(Refusal::invalid(format!("{operation}: {other} is no trencadis_qk_norm; give 0, 1 or 2")))
        }
    }
}

/// A factor on scores.
pub(super) fn scale_of(scale: f64, head_dim: u64) -> f64 {
    if scale == 0.0 { 1.0 / (head_dim as f64).sqrt() } else { scale }
}

impl Call {
    /// # Safety
    /// `given` is null or the address of a struct that is as large as it says.
    pub(super) unsafe fn new(kernels: *const Handle, given: *const Attention) -> Result<Self> {
        let device = device(kernels)?;
        // SAFETY: as the caller promises.
        let given = unsafe { read(given)? };
        let half = match given.dtype {
            n if n == Dtype::Bf16 as u32 => false,
            n if n == Dtype::F16 as u32 => true,
            other => {
                return Err(Refusal::unsupported(format!(
                    "attention: dtype is {other}; there are kernels for TRENCADIS_DTYPE_BF16 and TRENCADIS_DTYPE_F16"
                )));
            }
        };
        let rope = match given.rope_kind {
            n if n == Rope::None as u32 => CheckedRope::None,
            n if n == Rope::Interleaved as u32 => CheckedRope::Interleaved,
            n if n == Rope::Halves as u32 => CheckedRope::Halves,
            other => {
                return Err(Refusal::invalid(format!(
                    "attention: {other} is no trencadis_rope; give 0, 1 or 2"
                )));
            }
        };
        let config = AttentionConfig {
            heads: count(given.heads),
            kv_heads: count(if given.kv_heads == 0 { given.heads } else { given.kv_heads }),
            head_dim: count(given.head_dim),
            scale: scale_of(given.scale, given.head_dim),
            norm: norm_of("attention", given.norm)?,
            eps: given.eps,
            gain_per_head: given.gain_per_head != 0,
            rope,
        };
        let checked = Checked { config, tokens: count(given.tokens), slots: count(given.slots) };
        let info = device.info();
        let served = ForwardPlan::new(config.head_dim, info).is_some()
            && BackwardPlan::new(config.head_dim, info).is_some();
        let plans = checked.plan(info).and_then(|forward| Ok((forward, checked.backward_plan(info)?)));
        let (forward, backward) = plans.map_err(|error| {
            let refusal = Refusal::from(error);
            if served { refusal } else { Refusal::unsupported(refusal.message) }
        })?;
        let longest =
            if given.longest == 0 { checked.tokens } else { count(given.longest).min(checked.tokens) };
        Ok(Self { device, given, checked, half, longest, forward, backward })
    }

    fn memory(&self) -> Memory<'_> {
        Memory { device: &self.device, operation: "attention" }
    }

    fn words(&self, limits: Limits) -> Result<usize> {
        Ok(Schedule::words_needed(limits, self.checked.tokens, self.checked.slots)?)
    }

    fn cu_seqlens(&self) -> Result<Buffer<i32>> {
        self.memory().vector("cu_seqlens", self.given.cu_seqlens, self.checked.slots + 1)
    }

    /// Work lists in the caller's memory.
    fn schedule(&self, name: &str, at: *const i32, limits: Limits) -> Result<Schedule> {
        let words = self.memory().vector(name, at, self.words(limits)?)?;
        let Checked { tokens, slots, .. } = self.checked;
        Ok(Schedule::in_memory(words, limits, tokens, slots)?.with_longest(self.longest))
    }

    /// The same, of a pass that follows them.
    fn made(&self, name: &str, at: *const i32, limits: Limits, cu_seqlens: &Buffer<i32>) -> Result<Schedule> {
        // SAFETY: whoever calls a function of C promises that the lists were made of it before a pass follows them.
        Ok(unsafe { self.schedule(name, at, limits)?.already_made(cu_seqlens) })
    }

    /// Rows of queries, or of what has their shape.
    fn rows<E: Element>(&self, name: &str, at: *const c_void, stride: u64) -> Result<Lines<E>> {
        let AttentionConfig { heads, head_dim, .. } = self.checked.config;
        self.memory().lines(name, at, [self.checked.tokens, heads * head_dim], stride)
    }

    /// Rows of keys or values, or of their gradients.
    fn kv_rows<E: Element>(&self, name: &str, at: *const c_void, stride: u64) -> Result<Lines<E>> {
        self.memory().lines(name, at, [self.checked.tokens, self.checked.config.kv_width()], stride)
    }

    /// Numbers of each row and head of queries.
    fn of_heads(&self, name: &str, at: *const f32) -> Result<Buffer<f32>> {
        self.memory().vector(name, at, self.checked.tokens * self.checked.config.heads)
    }

    /// The table of the rotation.
    fn rope(&self) -> Result<Option<Buffer<f32>>> {
        self.memory().optional("rope", self.given.rope, self.checked.tokens * self.checked.config.head_dim)
    }

    /// What is kept of the norm, where it is wanted.
    fn statistics(&self) -> Result<Option<[Buffer<f32>; 4]>> {
        let Attention { q_mean, q_rstd, k_mean, k_rstd, .. } = self.given;
        if [q_mean, q_rstd, k_mean, k_rstd].iter().all(|at| at.is_null()) {
            return Ok(None);
        }
        let of_keys =
            |name, at| self.memory().vector(name, at, self.checked.tokens * self.checked.config.kv_heads);
        Ok(Some([
            self.of_heads("q_mean", q_mean)?,
            self.of_heads("q_rstd", q_rstd)?,
            of_keys("k_mean", k_mean)?,
            of_keys("k_rstd", k_rstd)?,
        ]))
    }

    pub(super) fn sizes(&self) -> Result<AttentionSizes> {
        Ok(AttentionSizes {
            size: 0,
            forward_schedule_words: self.words(self.forward.limits)? as u64,
            backward_schedule_words: self.words(self.backward.limits)? as u64,
            forward_workspace_bytes: self.checked.forward_workspace_bytes(&self.forward, self.longest) as u64,
            backward_workspace_bytes: (self.checked.backward_workspace_bytes(
                &self.backward,
                self.longest,
                true,
            )) as u64,
        })
    }

    pub(super) fn launch_schedule(&self, stream: &Stream) -> Result {
        let Attention { forward_schedule, backward_schedule, cu_seqlens_host, .. } = self.given;
        let lists = [
            ("forward_schedule", forward_schedule, self.forward.limits),
            ("backward_schedule", backward_schedule, self.backward.limits),
        ];
        if lists.iter().all(|(_, at, _)| at.is_null()) {
            return Err(Refusal::invalid(
                "attention: forward_schedule and backward_schedule are null; give the lists that are to be made",
            ));
        }
        let cu_seqlens = self.cu_seqlens()?;
        // SAFETY: as the caller of the function promises.
        let host = unsafe { host_starts(cu_seqlens_host, self.checked.slots)? };
        for (name, at, limits) in lists.into_iter().filter(|(_, at, _)| !at.is_null()) {
            self.schedule(name, at, limits)?.launch(stream, &cu_seqlens, host)?;
        }
        Ok(())
    }

    pub(super) fn launch_forward<E: Element>(&self, stream: &Stream) -> Result {
        let a = &self.given;
        let q = self.rows::<E>("q", a.q, a.q_stride)?;
        let (k, v) = (self.kv_rows("k", a.k, a.k_stride)?, self.kv_rows("v", a.v, a.v_stride)?);
        let (out, lse) = (self.rows("out", a.out, a.out_stride)?, self.of_heads("lse", a.lse)?);
        let affine = self.memory().affine(
            &self.checked.config,
            ["q_gain", "q_bias", "k_gain", "k_bias"],
            [a.q_gain, a.q_bias, a.k_gain, a.k_bias],
        )?;
        let (rope, statistics, cu_seqlens) = (self.rope()?, self.statistics()?, self.cu_seqlens()?);
        let limits = self.forward.limits;
        let schedule = self.made("forward_schedule", a.forward_schedule, limits, &cu_seqlens)?;
        let needed = self.checked.forward_workspace_bytes(&self.forward, self.longest);
        let workspace = self.memory().workspace(a.workspace, a.workspace_bytes, needed)?;
        let operands = Forward {
            q: q.rows(),
            k: k.rows(),
            v: v.rows(),
            affine: affine.each_ref().map(Option::as_ref),
            rope: rope.as_ref(),
            cu_seqlens: &cu_seqlens,
            schedule: &schedule,
            out: out.rows(),
            lse: &lse,
            statistics: statistics.as_ref().map(|[q_mean, q_rstd, k_mean, k_rstd]| Statistics {
                q_mean,
                q_rstd,
                k_mean,
                k_rstd,
            }),
            workspace: Some(&workspace),
        };
        Ok(self.checked.forward(stream, &self.forward, &operands)?)
    }

    pub(super) fn launch_backward<E: Element>(&self, stream: &Stream) -> Result {
        let a = &self.given;
        let (q, dq) = (self.rows::<E>("q", a.q, a.q_stride)?, self.rows("dq", a.dq, a.dq_stride)?);
        let (k, dk) = (self.kv_rows("k", a.k, a.k_stride)?, self.kv_rows("dk", a.dk, a.dk_stride)?);
        let (v, dv) = (self.kv_rows("v", a.v, a.v_stride)?, self.kv_rows("dv", a.dv, a.dv_stride)?);
        let (out, dout) = (self.rows("out", a.out, a.out_stride)?, self.rows("dout", a.dout, a.dout_stride)?);
        let lse = self.of_heads("lse", a.lse)?;
        let affine = self.memory().affine(
            &self.checked.config,
            ["q_gain", "q_bias", "k_gain", "k_bias"],
            [a.q_gain, a.q_bias, a.k_gain, a.k_bias],
        )?;
        let gradients = [a.dq_gain, a.dq_bias, a.dk_gain, a.dk_bias].map(<*mut f32>::cast_const);
        let daffine = self.memory().affine(
            &self.checked.config,
            ["dq_gain", "dq_bias", "dk_gain", "dk_bias"],
            gradients,
        )?;
        let accumulate = self.memory().optional("accumulate", a.accumulate, 1)?;
        let (rope, cu_seqlens) = (self.rope()?, self.cu_seqlens()?);
        let limits = self.backward.limits;
        let schedule = self.made("backward_schedule", a.backward_schedule, limits, &cu_seqlens)?;
        let wanted = daffine.iter().any(Option::is_some);
        let needed = self.checked.backward_workspace_bytes(&self.backward, self.longest, wanted);
        let workspace = self.memory().workspace(a.workspace, a.workspace_bytes, needed)?;
        let operands = Backward {
            q: q.rows(),
            k: k.rows(),
            v: v.rows(),
            out: out.rows(),
            lse: &lse,
            dout: dout.rows(),
            affine: affine.each_ref().map(Option::as_ref),
            rope: rope.as_ref(),
            cu_seqlens: &cu_seqlens,
            schedule: &schedule,
            dq: dq.rows(),
            dk: dk.rows(),
            dv: dv.rows(),
            daffine: daffine.each_ref().map(Option::as_ref),
            accumulate: accumulate.as_ref(),
            workspace: &workspace,
        };
        Ok(self.checked.backward(stream, &self.backward, &operands)?)
    }
}
