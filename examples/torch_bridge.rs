//! Lends the kernels to another engine in the same process: a library with a few C functions that take that
//! engine's addresses and stream. `tools/compare_torch.py --gpu` loads it beside PyTorch.
//!
//! An engine makes its CUDA context current, opens the kernels once, and queues launches; nothing here
//! allocates, copies or waits. Functions return 0 or a size, and −1 where [`trencadis_error`] tells why not.

use std::cell::RefCell;
use std::ffi::{c_char, c_void};

use half::bf16;
use trencadis::cpu::attention::AttentionConfig;
use trencadis::device::{Kernels, Ptr, RawStream};
use trencadis::kernels::attention::backward::raw::{AffineGrad, BackwardParams, backward};
use trencadis::kernels::attention::raw::{self, ForwardParams, QkNorm, QkStatistics};
use trencadis::kernels::attention::{Attention, BackwardPlan, ForwardPlan};
use trencadis::kernels::gemm::{Epilogue, GeluGrad, Gemm, Layout, Matrix, Plan, Shape, Store, Sum, Vector};
use trencadis::recipe::{GeluKind, QkNormKind};
use trencadis::{Error, Result};

thread_local! {
    static MESSAGE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// A product and what becomes of it. Matrices are dense and bf16, vectors f32; 0 is none.
#[repr(C)]
pub struct GemmCall {
    /// Result `[m, n]` over k.
    pub m: i64,
    pub n: i64,
    pub k: i64,
    /// 0 NT: `a[m, k] b[n, k]`; 1 NN: `b[k, n]`; 2 TN: `a[k, m] b[k, n]`.
    pub layout: i32,
    /// 0 the product; 1 with GELU (erf) of it, kept before GELU in `side`; 2 plus the residual `side`;
    /// 3 times the slope of GELU at `side`, column sums to `bias_grad`; 4 written to `out` in f32.
    pub fused: i32,
    pub a: u64,
    pub b: u64,
    pub out: u64,
    pub bias: u64,
    pub side: u64,
    pub bias_grad: u64,
    pub workspace: u64,
    pub workspace_bytes: u64,
}

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

fn code(outcome: Result<i64>) -> i64 {
    outcome.unwrap_or_else(|error| {
        MESSAGE.with_borrow_mut(|message| *message = error.to_string());
        -1
    })
}

/// Copies why the last function on this thread failed, cut to `capacity` bytes, and returns its length.
///
/// # Safety
/// `text` has room for `capacity` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_error(text: *mut c_char, capacity: u64) -> i64 {
    MESSAGE.with_borrow(|message| {
        let bytes = &message.as_bytes()[..message.len().min(capacity as usize)];
        // SAFETY: as the caller promises.
        unsafe { text.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        bytes.len() as i64
    })
}

/// Bytes of the structs, for callers to hold theirs against: which 0 GemmCall, 1 AttentionCall,
/// 2 AttentionSizes.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_struct_bytes(which: i32) -> i64 {
    match which {
        0 => size_of::<GemmCall>() as i64,
        1 => size_of::<AttentionCall>() as i64,
        2 => size_of::<AttentionSizes>() as i64,
        _ => -1,
    }
}

/// The kernels for the CUDA context that is current on this thread; null where there is none.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_open() -> *mut Kernels {
    match Kernels::for_current_context() {
        Ok(kernels) => Box::into_raw(Box::new(kernels)),
        Err(error) => {
            code(Err(error));
            std::ptr::null_mut()
        }
    }
}

/// Gives the kernels back, before the context is destroyed.
///
/// # Safety
/// `kernels` is of [`trencadis_open`] and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_close(kernels: *mut Kernels) {
    if !kernels.is_null() {
        // SAFETY: as the caller promises.
        drop(unsafe { Box::from_raw(kernels) });
    }
}

impl GemmCall {
    /// # Safety
    /// Every address has memory for what its field says.
    unsafe fn prepare(&self, kernels: &Kernels) -> Result<(Gemm<'_>, Epilogue<'_>, Plan)> {
        let layout = match self.layout {
            0 => Layout::Nt,
            1 => Layout::Nn,
            2 => Layout::Tn,
            other => return Err(Error::usage(format!("{other} is no layout, expected 0, 1 or 2"))),
        };
        let [m, n, k] = [self.m, self.n, self.k].map(|x| usize::try_from(x).unwrap_or(0));
        let [a_stride, b_stride] = match layout {
            Layout::Nt => [k, k],
            Layout::Nn => [k, n],
            Layout::Tn => [m, n],
        };
        // SAFETY: as the caller promises.
        let matrix =
            |address, stride, len| unsafe { Matrix::raw(Ptr::<bf16>::from_raw(address), stride, len) };
        // SAFETY: likewise.
        let vector = |address| unsafe { Vector::raw(Ptr::<f32>::from_raw(address), n) };
        let result = |address| matrix(address, n, m * n);
        let gelu = GeluKind::Erf;
        let plain = Store { bias: vector(self.bias), ..Store::plain(result(self.out)) };
        let epilogue = match self.fused {
            0 => Epilogue::Store(plain),
            1 => Epilogue::Store(Store { gelu: Some(gelu), pre: result(self.side), ..plain }),
            2 => Epilogue::Store(Store { residual: result(self.side), ..plain }),
            3 => Epilogue::GeluGrad(GeluGrad {
                out: result(self.out),
                pre: result(self.side),
                gelu,
                bias_grad: vector(self.bias_grad),
                accumulate: Vector::none(),
            }),
            4 => Epilogue::Sum(Sum {
                // SAFETY: likewise.
                out: unsafe { Matrix::raw(Ptr::from_raw(self.out), n, m * n) },
                accumulate: Vector::none(),
            }),
            other => {
                return Err(Error::usage(format!("{other} is nothing that can be fused, expected 0 to 4")));
            }
        };
        let gemm = Gemm {
            shape: Shape { layout, m, n, k },
            a: matrix(self.a, a_stride, m * k),
            b: matrix(self.b, b_stride, n * k),
            live: Vector::none(),
            dependent: false,
        };
        let plan = gemm.plan(&epilogue, kernels.info())?;
        Ok((gemm, epilogue, plan))
    }
}

/// Bytes of workspace that a product needs.
///
/// # Safety
/// `kernels` is open, `call` is a struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_gemm_workspace(kernels: *const Kernels, call: *const GemmCall) -> i64 {
    // SAFETY: as the caller promises; addresses are not followed.
    let (kernels, call) = unsafe { (&*kernels, &*call) };
    // SAFETY: nothing is launched.
    code(
        unsafe { call.prepare(kernels) }
            .map(|(gemm, epilogue, plan)| epilogue.workspace_bytes(gemm.shape, &plan) as i64),
    )
}

/// Queues a product.
///
/// # Safety
/// `kernels` is open, its context current, `stream` one of its streams, every address in `call` as its field
/// says until the kernels have run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_gemm(
    kernels: *const Kernels,
    stream: *mut c_void,
    call: *const GemmCall,
) -> i64 {
    // SAFETY: as the caller promises.
    let (kernels, call) = unsafe { (&*kernels, &*call) };
    // SAFETY: likewise.
    code(unsafe { call.prepare(kernels) }.and_then(|(gemm, epilogue, plan)| unsafe {
        let workspace = Vector::raw(Ptr::<u8>::from_raw(call.workspace), call.workspace_bytes as usize);
        gemm.launch_on(kernels, RawStream(stream), &epilogue, &plan, &workspace).map(|()| 0)
    }))
}

impl AttentionCall {
    fn plans(&self, kernels: &Kernels) -> Result<(Attention, ForwardPlan, BackwardPlan)> {
        let count = |x: i64| usize::try_from(x).unwrap_or(0);
        let config = AttentionConfig {
            heads: count(self.heads),
            head_dim: count(self.head_dim),
            scale: self.scale,
            norm: match self.norm {
                0 => QkNormKind::None,
                1 => QkNormKind::Rms,
                _ => QkNormKind::LayerNorm,
            },
            eps: self.eps,
            gain_per_head: true,
        };
        let (tokens, slots) = (count(self.tokens), count(self.slots));
        let attention = Attention { config, tokens, slots };
        let info = kernels.info();
        Ok((attention, attention.plan(info)?, attention.backward_plan(info)?))
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
            workspace_bytes: attention.backward_workspace_bytes(&backward, true) as u64,
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
            let longest = usize::try_from(call.longest).unwrap_or(usize::MAX).min(tokens);
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
        let longest = usize::try_from(call.longest).unwrap_or(usize::MAX).min(attention.tokens);
        let none = Ptr::null(); // The backward pass makes the statistics again.
        let params = ForwardParams {
            q: Ptr::from_raw(call.q),
            k: Ptr::from_raw(call.k),
            v: Ptr::from_raw(call.v),
            out: Ptr::from_raw(call.out),
            lse: Ptr::from_raw(call.lse),
            cu_seqlens: Ptr::from_raw(call.cu_seqlens),
            schedule: Ptr::from_raw(call.forward_schedule),
            norm: call.norm(),
            statistics: QkStatistics { q_mean: none, q_rstd: none, k_mean: none, k_rstd: none },
            q_stride: call.stride,
            k_stride: call.stride,
            v_stride: call.stride,
            out_stride: call.heads * call.head_dim,
            tokens: call.tokens as i32,
            slots: call.slots as i32,
            heads: call.heads as i32,
            head_dim: call.head_dim as i32,
            scale: call.scale as f32,
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
    code(call.plans(kernels).and_then(|(_, _, plan)| {
        let width = call.heads * call.head_dim;
        let delta = Ptr::<f32>::from_raw(call.workspace);
        let partial = delta.offset((call.tokens * call.heads) as usize);
        let gains = call.dq_gain != 0 && call.norm != 0;
        let params = BackwardParams {
            q: Ptr::from_raw(call.q),
            k: Ptr::from_raw(call.k),
            v: Ptr::from_raw(call.v),
            out: Ptr::from_raw(call.out),
            dout: Ptr::from_raw(call.dout),
            dq: Ptr::from_raw(call.dq),
            dk: Ptr::from_raw(call.dk),
            dv: Ptr::from_raw(call.dv),
            lse: Ptr::from_raw(call.lse),
            delta,
            partial: if gains { partial } else { Ptr::null() },
            cu_seqlens: Ptr::from_raw(call.cu_seqlens),
            schedule: Ptr::from_raw(call.backward_schedule),
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
            head_dim: call.head_dim as i32,
            short_rows: plan.short_rows as i32,
            tile_rows: plan.limits.tile_rows as i32,
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
        unsafe { backward(kernels, RawStream(stream), &plan, &params, &affine) }.map(|()| 0)
    }))
}
