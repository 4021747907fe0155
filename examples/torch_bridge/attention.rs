//! Packed attention in another engine's memory.

use std::ffi::c_void;

use trencadis::Result;
use trencadis::cpu::attention::AttentionConfig;
use trencadis::device::{Kernels, Ptr, RawStream};
use trencadis::kernels::attention::backward::raw::{AffineGrad, BackwardParams, backward};
use trencadis::kernels::attention::raw::{self, ForwardParams, QkNorm, QkStatistics};
use trencadis::kernels::attention::{Attention, BackwardPlan, ForwardPlan};
use trencadis::recipe::{QkNormKind, Rope};

use super::code;

/// Packed attention. q, k, v and their gradients have rows of `stride` elements, `out` and `dout` dense ones.
#[repr(C)]
pub struct AttentionCall {
    pub tokens: i64,
    pub slots: i64,
    /// Longest image.
    pub longest: i64,
    pub heads: i64,
    pub head_dim: i64,
    pub stride: i64,
    pub scale: f64,
    pub eps: f64,
    /// 0 none, 1 RMS, 2 LayerNorm; gains `[heads, head_dim]`.
    pub norm: i64,
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub out: u64,
    pub lse: u64,
    pub q_gain: u64,
    pub k_gain: u64,
    pub cu_seqlens: u64,
    /// Work lists of the forward and of the backward pass, and the word that tells a bad `cu_seqlens`.
    pub forward_schedule: u64,
    pub backward_schedule: u64,
    pub fault: u64,
    pub dout: u64,
    pub dq: u64,
    pub dk: u64,
    pub dv: u64,
    pub dq_gain: u64,
    pub dk_gain: u64,
    pub workspace: u64,
}

/// What a caller allocates for an [`AttentionCall`].
#[repr(C)]
pub struct AttentionSizes {
    /// 32-bit words.
    pub forward_schedule: u64,
    pub backward_schedule: u64,
    pub workspace_bytes: u64,
}

impl AttentionCall {
    fn plans(&self, kernels: &Kernels) -> Result<(Attention, ForwardPlan, BackwardPlan)> {
        let count = |x: i64| usize::try_from(x).unwrap_or(0);
        let config = AttentionConfig {
            heads: count(self.heads),
            kv_heads: count(self.heads),
            head_dim: count(self.head_dim),
            scale: self.scale,
            norm: match self.norm {
                0 => QkNormKind::None,
                1 => QkNormKind::Rms,
                _ => QkNormKind::LayerNorm,
            },
            eps: self.eps,
            gain_per_head: true,
            rope: Rope::None,
        };
        let (tokens, slots) = (count(self.tokens), count(self.slots));
        let attention = Attention { config, tokens, slots };
        let info = kernels.info();
        Ok((attention, attention.plan(info)?, attention.backward_plan(info)?))
    }

    fn longest(&self) -> usize {
        usize::try_from(self.longest).unwrap_or(usize::MAX)
    }

    fn norm(&self) -> QkNorm {
        QkNorm {
            q_gain: Ptr::from_raw(self.q_gain),
            k_gain: Ptr::from_raw(self.k_gain),
            q_bias: Ptr::null(),
            k_bias: Ptr::null(),
            kind: self.norm as i32,
            per_head: 1,
            eps: self.eps as f32,
            unused: 0,
        }
    }
}

/// Tells what to allocate.
///
/// # Safety
/// `kernels` is open, the others are structs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_attention_sizes(
    kernels: *const Kernels,
    call: *const AttentionCall,
    sizes: *mut AttentionSizes,
) -> i64 {
    // SAFETY: as the caller promises.
    let (kernels, call, sizes) = unsafe { (&*kernels, &*call, &mut *sizes) };
    code(call.plans(kernels).map(|(attention, forward, backward)| {
        let Attention { tokens, slots, .. } = attention;
        *sizes = AttentionSizes {
            forward_schedule: forward.limits.words(tokens, slots) as u64,
            backward_schedule: backward.limits.words(tokens, slots) as u64,
            workspace_bytes: (attention.backward_workspace_bytes(&backward, call.longest(), true))
                .max(attention.forward_workspace_bytes(&forward, call.longest()))
                as u64,
        };
        0
    }))
}

/// Queues the making of both work lists from `cu_seqlens`.
///
/// # Safety
/// As for [`trencadis_gemm`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_attention_schedule(
    kernels: *const Kernels,
    stream: *mut c_void,
    call: *const AttentionCall,
) -> i64 {
    // SAFETY: as the caller promises.
    let (kernels, call) = unsafe { (&*kernels, &*call) };
    code(call.plans(kernels).and_then(|(attention, forward, backward)| {
        let lists = [(forward.limits, call.forward_schedule), (backward.limits, call.backward_schedule)];
        for (limits, words) in lists {
            let cu_seqlens = Ptr::from_raw(call.cu_seqlens);
            let (words, fault) = (Ptr::from_raw(words), Ptr::from_raw(call.fault));
            let Attention { slots, tokens, .. } = attention;
            let longest = call.longest().min(tokens);
            let params = limits.params(cu_seqlens, words, fault, slots, tokens, longest);
            // SAFETY: as the caller promises.
            unsafe { raw::schedule(kernels, RawStream(stream), &params)? };
        }
        Ok(0)
    }))
}

/// Queues the forward pass.
///
/// # Safety
/// As for [`trencadis_gemm`], after the work lists.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_attention_forward(
    kernels: *const Kernels,
    stream: *mut c_void,
    call: *const AttentionCall,
) -> i64 {
    // SAFETY: as the caller promises.
    let (kernels, call) = unsafe { (&*kernels, &*call) };
    code(call.plans(kernels).and_then(|(attention, plan, _)| {
        let longest = call.longest().min(attention.tokens);
        let none = Ptr::null(); // The backward pass makes the statistics again.
        let params: ForwardParams = ForwardParams {
            q: Ptr::from_raw(call.q),
            k: Ptr::from_raw(call.k),
            v: Ptr::from_raw(call.v),
            k_norm: Ptr::from_raw(call.workspace),
            out: Ptr::from_raw(call.out),
            lse: Ptr::from_raw(call.lse),
            cu_seqlens: Ptr::from_raw(call.cu_seqlens),
            schedule: Ptr::from_raw(call.forward_schedule),
            rope: Ptr::null(),
            norm: call.norm(),
            statistics: QkStatistics { q_mean: none, q_rstd: none, k_mean: none, k_rstd: none },
            q_stride: call.stride,
            k_stride: call.stride,
            v_stride: call.stride,
            out_stride: call.heads * call.head_dim,
            tokens: call.tokens as i32,
            slots: call.slots as i32,
            heads: call.heads as i32,
            kv_heads: call.heads as i32,
            head_dim: call.head_dim as i32,
            rope_kind: 0,
            scale: call.scale as f32,
            turns: i32::from(plan.turns),
            pairs: 0,
            unused: 0,
        };
        // SAFETY: as the caller promises.
        unsafe { raw::forward(kernels, RawStream(stream), &plan, &params, longest) }.map(|()| 0)
    }))
}

/// Queues the backward pass.
///
/// # Safety
/// As for [`trencadis_gemm`], after the forward pass.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_attention_backward(
    kernels: *const Kernels,
    stream: *mut c_void,
    call: *const AttentionCall,
) -> i64 {
    // SAFETY: as the caller promises.
    let (kernels, call) = unsafe { (&*kernels, &*call) };
    code(call.plans(kernels).and_then(|(attention, _, plan)| {
        let width = call.heads * call.head_dim;
        let gains = call.dq_gain != 0 && call.norm != 0;
        let workspace = plan.workspace(&attention.backward_sizes(call.longest(), gains));
        let base = Ptr::from_raw(call.workspace);
        let params: BackwardParams = BackwardParams {
            q: Ptr::from_raw(call.q),
            k: Ptr::from_raw(call.k),
            v: Ptr::from_raw(call.v),
            out: Ptr::from_raw(call.out),
            dout: Ptr::from_raw(call.dout),
            dq: Ptr::from_raw(call.dq),
            dk: Ptr::from_raw(call.dk),
            dv: Ptr::from_raw(call.dv),
            lse: Ptr::from_raw(call.lse),
            delta: base.cast(),
            partial: if gains { workspace.partial(base) } else { Ptr::null() },
            cu_seqlens: Ptr::from_raw(call.cu_seqlens),
            schedule: Ptr::from_raw(call.backward_schedule),
            rope: Ptr::null(),
            norm: call.norm(),
            q_stride: call.stride,
            k_stride: call.stride,
            v_stride: call.stride,
            out_stride: width,
            dout_stride: width,
            dq_stride: call.stride,
            dk_stride: call.stride,
            dv_stride: call.stride,
            tokens: call.tokens as i32,
            slots: call.slots as i32,
            heads: call.heads as i32,
            kv_heads: call.heads as i32,
            head_dim: call.head_dim as i32,
            short_rows: plan.short_rows as i32,
            tile_rows: plan.limits.tile_rows as i32,
            rope_kind: 0,
            unused: 0,
            scale: call.scale as f32,
        };
        let affine = AffineGrad {
            q_gain: Ptr::from_raw(call.dq_gain),
            q_bias: Ptr::null(),
            k_gain: Ptr::from_raw(call.dk_gain),
            k_bias: Ptr::null(),
            accumulate: Ptr::null(),
        };
        // SAFETY: as the caller promises.
        unsafe { backward(kernels, RawStream(stream), &plan, &params, &workspace, base, &affine)? };
        Ok(0)
    }))
}
