//! Packed attention: its structs and functions. What they do is in `attention_call`.

use std::ffi::c_void;

use bytemuck::Zeroable;
use half::{bf16, f16};

use super::attention_call::Call;
use super::handle::{Handle, borrow};
use super::status::{Status, guard};
use super::structs::{sized, write};
use crate::kernels::attention::raw;

/// Attention of packed images, each of which attends to itself: images lie one after another in the rows of q, k and v,
/// and `cu_seqlens` says where each begins. `softmax(scale * norm(q) norm(k)^T) v` for each head.
///
/// Head h of row t begins at element `t * stride + h * head_dim`, so q, k and v may be parts of one tensor. A stride of 0
/// means that rows follow one another; others are multiples of 8. Addresses are those of device memory and multiples of 16
/// bytes, which stay valid until the kernels have run. Rows of no image are written as zeros. What a
/// function does not need may be null.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct Attention {
    /// sizeof(trencadis_attention).
    pub size: u64,
    /// Rows of q, k, v and out, those of no image at the end included.
    pub tokens: u64,
    /// Images that `cu_seqlens` has room for; unused ones are empty.
    pub slots: u64,
    /// Most rows that an image has, which saves launches and workspace where it is small; 0: `tokens`. A longer image is
    /// refused as a bad `cu_seqlens` is.
    pub longest: u64,
    /// Heads of q and out.
    pub heads: u64,
    /// Heads of k and v, a divisor of `heads`, each for `heads / kv_heads` neighbouring heads of q; 0: `heads`.
    pub kv_heads: u64,
    /// Columns of a head, a multiple of 8 to 128.
    pub head_dim: u64,
    /// Factor on the scores; 0: 1 / sqrt(head_dim).
    pub scale: f64,
    /// Added to the variance by the norm of q and k.
    pub eps: f64,
    /// Elements of q, k, v, out and their gradients: a trencadis_dtype.
    pub dtype: u32,
    /// Normalisation of q and k: a trencadis_qk_norm.
    pub norm: u32,
    /// 1: gains and biases are [heads, head_dim], those of k [kv_heads, head_dim]; 0: `[head_dim]`.
    pub gain_per_head: u32,
    /// How rows are rotated by `rope`: a trencadis_rope.
    pub rope_kind: u32,

    /// Queries, [tokens, heads * head_dim].
    pub q: *const c_void,
    /// Keys, [tokens, kv_heads * head_dim].
    pub k: *const c_void,
    /// Values, likewise.
    pub v: *const c_void,
    /// Elements from row to row of q.
    pub q_stride: u64,
    /// Elements from row to row of k.
    pub k_stride: u64,
    /// Elements from row to row of v.
    pub v_stride: u64,
    /// Gain of the norm of q; null is 1.
    pub q_gain: *const f32,
    /// Bias of the norm of q; null is 0.
    pub q_bias: *const f32,
    /// Gain of the norm of k; null is 1.
    pub k_gain: *const f32,
    /// Bias of the norm of k; null is 0.
    pub k_bias: *const f32,
    /// Cosine and sine by which pairs of columns of q and k are rotated after the norm, [tokens, head_dim / 2, 2]; null:
    /// none are.
    pub rope: *const f32,
    /// Starts of the images, ascending from 0, and the end of the last one, [slots + 1].
    pub cu_seqlens: *const i32,
    /// The same in memory of the host, checked before the schedule is launched; may be null.
    pub cu_seqlens_host: *const i32,
    /// Work lists of the forward pass, of `forward_schedule_words` numbers, zeros before they are first made. The last
    /// number is where the device tells that it refuses `cu_seqlens`, see trencadis_attention_fault; results are then
    /// zeros.
    pub forward_schedule: *mut i32,
    /// Work lists of the backward pass, of `backward_schedule_words` numbers; likewise.
    pub backward_schedule: *mut i32,
    /// Workspace of either pass.
    pub workspace: *mut c_void,
    /// Its bytes.
    pub workspace_bytes: u64,

    /// Result, [tokens, heads * head_dim]; apart from the operands.
    pub out: *mut c_void,
    /// Elements from row to row of out.
    pub out_stride: u64,
    /// Natural logarithm of the sum of the exponentials of the scaled scores, [tokens, heads].
    pub lse: *mut f32,
    /// Means of the rows of q, [tokens, heads], written by the forward pass where all four of these are given.
    pub q_mean: *mut f32,
    /// Reciprocal standard deviations of the rows of q, [tokens, heads].
    pub q_rstd: *mut f32,
    /// Means of the rows of k, [tokens, kv_heads].
    pub k_mean: *mut f32,
    /// Reciprocal standard deviations of the rows of k, [tokens, kv_heads].
    pub k_rstd: *mut f32,

    /// Gradient of out, of its shape.
    pub dout: *const c_void,
    /// Elements from row to row of dout.
    pub dout_stride: u64,
    /// Gradient of q, of its shape; apart from the operands, as dk and dv are.
    pub dq: *mut c_void,
    /// Gradient of k.
    pub dk: *mut c_void,
    /// Gradient of v.
    pub dv: *mut c_void,
    /// Elements from row to row of dq.
    pub dq_stride: u64,
    /// Elements from row to row of dk.
    pub dk_stride: u64,
    /// Elements from row to row of dv.
    pub dv_stride: u64,
    /// Gradient of `q_gain`; null: not wanted, here and below.
    pub dq_gain: *mut f32,
    /// Gradient of `q_bias`.
    pub dq_bias: *mut f32,
    /// Gradient of `k_gain`.
    pub dk_gain: *mut f32,
    /// Gradient of `k_bias`.
    pub dk_bias: *mut f32,
    /// One number: where it is not 0, gradients of gains and biases are added to. Null: they are written.
    pub accumulate: *const i32,
}
sized!(Attention, "trencadis_attention", 384);

/// Pairs of columns that a rotary embedding rotates: `rope_kind` of an operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rope {
    /// None.
    None = 0,
    /// Columns 2 c and 2 c + 1.
    Interleaved = 1,
    /// Columns c and c + head_dim / 2.
    Halves = 2,
}

/// What a caller allocates for attention, before any pass.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct AttentionSizes {
    /// sizeof(trencadis_attention_sizes).
    pub size: u64,
    /// Numbers of 4 bytes.
    pub forward_schedule_words: u64,
    /// Numbers of 4 bytes.
    pub backward_schedule_words: u64,
    /// Bytes of workspace of the forward pass; may be 0.
    pub forward_workspace_bytes: u64,
    /// Bytes of workspace of the backward pass, with gradients of gains and biases.
    pub backward_workspace_bytes: u64,
}
sized!(AttentionSizes, "trencadis_attention_sizes", 40);

/// Tells what to allocate: it reads the numbers of `attention` and none of its addresses.
///
/// # Safety
/// Both structs have their `size` set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_attention_plan(
    kernels: *const Handle,
    attention: *const Attention,
    sizes: *mut AttentionSizes,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe { write(sizes, &Call::new(kernels, attention)?.sizes()?) })
}

/// Queues the making of the work lists whose addresses are given, from `cu_seqlens`: once for each batch, before all
/// layers. Passes over them take the same `cu_seqlens`, `tokens`, `slots`, `longest`, `head_dim` and `dtype`.
///
/// # Safety
/// Addresses are as their fields say until the kernels have run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_attention_schedule(
    kernels: *const Handle,
    stream: *mut c_void,
    attention: *const Attention,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let call = Call::new(kernels, attention)?;
        call.launch_schedule(&borrow(&call.device, stream)?)
    })
}

/// Queues the forward pass, over `forward_schedule`: writes `out`, `lse` and the statistics.
///
/// # Safety
/// Addresses are as their fields say until the kernels have run; the work lists are made, or queued before on the stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_attention_forward(
    kernels: *const Handle,
    stream: *mut c_void,
    attention: *const Attention,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let call = Call::new(kernels, attention)?;
        let stream = borrow(&call.device, stream)?;
        if call.half { call.launch_forward::<f16>(&stream) } else { call.launch_forward::<bf16>(&stream) }
    })
}

/// Queues the backward pass, over `backward_schedule`: writes `dq`, `dk`, `dv` and the gradients of gains and biases from
/// `dout` and what the forward pass took and wrote.
///
/// # Safety
/// As for `trencadis_attention_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_attention_backward(
    kernels: *const Handle,
    stream: *mut c_void,
    attention: *const Attention,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let call = Call::new(kernels, attention)?;
        let stream = borrow(&call.device, stream)?;
        if call.half { call.launch_backward::<f16>(&stream) } else { call.launch_backward::<bf16>(&stream) }
    })
}

/// What the last number of a schedule says, once it has been copied to the host: 0 is fine, others are an invalid argument with a
/// sentence.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_attention_fault(fault: i32) -> Status {
    guard(|| Ok(raw::fault(fault)?))
}
