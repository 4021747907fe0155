//! Masked attention pooling.

use std::ffi::c_void;

use bytemuck::Zeroable;
use half::bf16;

use super::Dtype;
use super::attention_call::{norm_of, scale_of};
use super::handle::{Handle, borrow, device};
use super::operands::{Memory, count, host_starts};
use super::status::{Refusal, Result, Status, guard};
use super::structs::{read, sized, write};
use crate::device::{Buffer, Device, Stream};
use crate::kernels::pool::{
    AttentionBackward, AttentionForward, AttentionPool, AttentionShape, MAX_HEAD_DIM, MAX_QUERIES,
    PackedSizes, Query, fault,
};
use crate::ops::{AttentionConfig, Rope};

/// Attention pooling of packed images: the same few queries ask the tokens of each image, so that an image becomes one
/// vector for each of them. Head h of row t begins at element `t * stride + h * head_dim`. Strides are in elements and
/// multiples of 8, 0 where rows follow one another. Addresses are those of device memory and multiples of 16 bytes, which
/// stay valid until the kernels have run.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct Pool {
    /// sizeof(trencadis_pool).
    pub size: u64,
    /// Rows of k and v, those of no image at the end included.
    pub tokens: u64,
    /// Images that `cu_seqlens` has room for; unused ones are empty.
    pub slots: u64,
    /// Tokens at the beginning of every image that are left out.
    pub skip: u64,
    /// Queries, 1 to 8.
    pub queries: u64,
    /// Heads, 1 to 4096.
    pub heads: u64,
    /// Columns of a head, a multiple of 8 to 256.
    pub head_dim: u64,
    /// Factor on the scores; 0: 1 / sqrt(head_dim).
    pub scale: f64,
    /// Added to the variance by the norm of queries and keys.
    pub eps: f64,
    /// Elements of k, v, out and their gradients: a trencadis_dtype, TRENCADIS_DTYPE_BF16.
    pub dtype: u32,
    /// Elements of q and dq: TRENCADIS_DTYPE_BF16 or TRENCADIS_DTYPE_F32.
    pub query_dtype: u32,
    /// Normalisation of queries and keys: a trencadis_qk_norm.
    pub norm: u32,
    /// 1: gains and biases are [heads, head_dim]; 0: `[head_dim]`.
    pub gain_per_head: u32,

    /// [queries, heads * head_dim].
    pub q: *const c_void,
    /// [tokens, heads * head_dim].
    pub k: *const c_void,
    /// [tokens, heads * head_dim].
    pub v: *const c_void,
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
    /// Starts of the images, ascending from 0, and the end of the last one, [slots + 1].
    pub cu_seqlens: *const i32,
    /// The same in memory of the host, checked before a launch; may be null.
    pub cu_seqlens_host: *const i32,
    /// One number, 0 before, where the device tells that it refuses `cu_seqlens`, see trencadis_pool_fault; results then
    /// mean nothing. May be null.
    pub fault: *mut i32,
    /// Result, [slots, queries, heads * head_dim].
    pub out: *mut c_void,
    /// Natural logarithm of the sum of the exponentials of the scaled scores, [slots, queries, heads].
    pub lse: *mut f32,
    /// Workspace of either pass.
    pub workspace: *mut c_void,
    /// Its bytes.
    pub workspace_bytes: u64,

    /// Gradient of out, of its shape.
    pub dout: *const c_void,
    /// Gradient of k, of its shape.
    pub dk: *mut c_void,
    /// Gradient of v, of its shape.
    pub dv: *mut c_void,
    /// Elements from row to row of dk.
    pub dk_stride: u64,
    /// Elements from row to row of dv.
    pub dv_stride: u64,
    /// Gradient of q, of its shape; null: not wanted, here and below.
    pub dq: *mut c_void,
    /// Gradient of `q_gain`.
    pub dq_gain: *mut f32,
    /// Gradient of `q_bias`.
    pub dq_bias: *mut f32,
    /// Gradient of `k_gain`.
    pub dk_gain: *mut f32,
    /// Gradient of `k_bias`.
    pub dk_bias: *mut f32,
    /// One number: where it is not 0, gradients in f32 are added to. Null: they are written.
    pub accumulate: *const i32,
}
sized!(Pool, "trencadis_pool", 304);

/// What a caller allocates for attention pooling.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct PoolSizes {
    /// sizeof(trencadis_pool_sizes).
    pub size: u64,
    /// Bytes of workspace of the forward pass.
    pub forward_workspace_bytes: u64,
    /// Bytes of workspace of the backward pass.
    pub backward_workspace_bytes: u64,
}
sized!(PoolSizes, "trencadis_pool_sizes", 24);

struct Call {
    device: Device,
    given: Pool,
    checked: AttentionPool,
    shape: AttentionShape,
    /// Whether the query is f32.
    wide: bool,
}

/// What the forward pass takes and writes.
struct Operands<'a> {
    q: Option<Buffer<bf16>>,
    q_f32: Option<Buffer<f32>>,
    k: super::operands::Lines<bf16>,
    v: super::operands::Lines<bf16>,
    affine: [Option<Buffer<f32>>; 4],
    cu_seqlens: Buffer<i32>,
    cu_seqlens_host: Option<&'a [i32]>,
    error: Option<Buffer<i32>>,
    out: Buffer<bf16>,
    lse: Buffer<f32>,
}

impl Operands<'_> {
    fn forward(&self) -> Result<AttentionForward<'_>> {
        let q = match (&self.q, &self.q_f32) {
            (Some(q), _) => Query::Bf16(q),
            (_, Some(q)) => Query::F32(q),
            _ => return Err(Refusal::invalid("pool: q is null; give it an address in memory of the device")),
        };
        Ok(AttentionForward {
            q,
            k: self.k.rows(),
            v: self.v.rows(),
            affine: self.affine.each_ref().map(Option::as_ref),
            cu_seqlens: &self.cu_seqlens,
            cu_seqlens_host: self.cu_seqlens_host,
            error: self.error.as_ref(),
            out: &self.out,
            lse: &self.lse,
        })
    }
}

impl Call {
    /// # Safety
    /// `given` is null or the address of a struct that is as large as it says.
    unsafe fn new(kernels: *const Handle, given: *const Pool) -> Result<Self> {
        let device = device(kernels)?;
        // SAFETY: as the caller promises.
        let given = unsafe { read(given)? };
        let wide = given.query_dtype == Dtype::F32 as u32;
        if given.dtype != Dtype::Bf16 as u32 || !(wide || given.query_dtype == Dtype::Bf16 as u32) {
            return Err(Refusal::unsupported(
                "pool: dtype must be TRENCADIS_DTYPE_BF16, query_dtype that or TRENCADIS_DTYPE_F32; there are no kernels \
                 for others",
            ));
        }
        let config = AttentionConfig {
            heads: count(given.heads),
            kv_heads: count(given.heads),
            head_dim: count(given.head_dim),
            scale: scale_of(given.scale, given.head_dim),
            norm: norm_of("pool", given.norm)?,
            eps: given.eps,
            gain_per_head: given.gain_per_head != 0,
            rope: Rope::None,
        };
        let sizes =
            PackedSizes { tokens: count(given.tokens), images: count(given.slots), skip: count(given.skip) };
        let checked = AttentionPool { config, sizes, queries: count(given.queries) };
        let shape = checked.shape().map_err(|error| {
            let refusal = Refusal::from(error);
            let served = (1..=MAX_HEAD_DIM).contains(&config.head_dim)
                && config.head_dim.is_multiple_of(8)
                && (1..=MAX_QUERIES).contains(&checked.queries);
            if served { refusal } else { Refusal::unsupported(refusal.message) }
        })?;
        Ok(Self { device, given, checked, shape, wide })
    }

    fn memory(&self) -> Memory<'_> {
        Memory { device: &self.device, operation: "pool" }
    }

    fn width(&self) -> usize {
        self.checked.config.heads * self.checked.config.head_dim
    }

    fn operands(&self) -> Result<Operands<'_>> {
        let (p, memory, width) = (&self.given, self.memory(), self.width());
        let AttentionPool { config, sizes, queries } = self.checked;
        let (rows, asked) = ([sizes.tokens, width], queries * width);
        let narrow_q = if self.wide { None } else { Some(memory.vector("q", p.q, asked)?) };
        let wide_q = if self.wide { Some(memory.vector("q", p.q, asked)?) } else { None };
        Ok(Operands {
            q: narrow_q,
            q_f32: wide_q,
            k: memory.lines("k", p.k, rows, p.k_stride)?,
            v: memory.lines("v", p.v, rows, p.v_stride)?,
            affine: memory.affine(
                &self.checked.config,
                ["q_gain", "q_bias", "k_gain", "k_bias"],
                [p.q_gain, p.q_bias, p.k_gain, p.k_bias],
            )?,
            cu_seqlens: memory.vector("cu_seqlens", p.cu_seqlens, sizes.images + 1)?,
            // SAFETY: as the caller of the function promises.
            cu_seqlens_host: unsafe { host_starts(p.cu_seqlens_host, sizes.images)? },
            error: memory.optional("fault", p.fault, 1)?,
            out: memory.vector("out", p.out, sizes.images * asked)?,
            lse: memory.vector("lse", p.lse, sizes.images * queries * config.heads)?,
        })
    }

    fn launch_forward(&self, stream: &Stream) -> Result {
        let operands = self.operands()?;
        let (at, bytes) = (self.given.workspace, self.given.workspace_bytes);
        let workspace = self.memory().workspace(at, bytes, self.shape.forward_workspace_bytes())?;
        Ok(self.checked.forward(stream, &operands.forward()?, &workspace)?)
    }

    fn launch_backward(&self, stream: &Stream) -> Result {
        let (p, memory, operands) = (&self.given, self.memory(), self.operands()?);
        let AttentionPool { sizes, queries, .. } = self.checked;
        let (rows, asked) = ([sizes.tokens, self.width()], queries * self.width());
        let dout = memory.vector("dout", p.dout, sizes.images * asked)?;
        let dk = memory.lines("dk", p.dk, rows, p.dk_stride)?;
        let dv = memory.lines("dv", p.dv, rows, p.dv_stride)?;
        let dq = if self.wide { None } else { memory.optional("dq", p.dq, asked)? };
        let dq_f32 = if self.wide { memory.optional("dq", p.dq, asked)? } else { None };
        let gradients = [p.dq_gain, p.dq_bias, p.dk_gain, p.dk_bias].map(<*mut f32>::cast_const);
        let daffine = self.memory().affine(
            &self.checked.config,
            ["dq_gain", "dq_bias", "dk_gain", "dk_bias"],
            gradients,
        )?;
        let accumulate = memory.optional("accumulate", p.accumulate, 1)?;
        let needed = self.shape.backward_workspace_bytes();
        let workspace = memory.workspace(p.workspace, p.workspace_bytes, needed)?;
        let gradients = AttentionBackward {
            dout: &dout,
            dk: dk.rows(),
            dv: dv.rows(),
            dq: dq.as_ref(),
            dq_f32: dq_f32.as_ref(),
            daffine: daffine.each_ref().map(Option::as_ref),
            accumulate: accumulate.as_ref(),
        };
        Ok(self.checked.backward(stream, &operands.forward()?, &gradients, &workspace)?)
    }
}

/// Tells what to allocate: it reads the numbers of `pool` and none of its addresses.
///
/// # Safety
/// Both structs have their `size` set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_pool_plan(
    kernels: *const Handle,
    pool: *const Pool,
    sizes: *mut PoolSizes,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let shape = Call::new(kernels, pool)?.shape;
        let told = PoolSizes {
            size: 0,
            forward_workspace_bytes: shape.forward_workspace_bytes() as u64,
            backward_workspace_bytes: shape.backward_workspace_bytes() as u64,
        };
        write(sizes, &told)
    })
}

/// Queues the forward pass: writes `out` and `lse`.
///
/// # Safety
/// Addresses are as their fields say until the kernels have run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_pool_forward(
    kernels: *const Handle,
    stream: *mut c_void,
    pool: *const Pool,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let call = Call::new(kernels, pool)?;
        call.launch_forward(&borrow(&call.device, stream)?)
    })
}

/// Queues the backward pass: writes `dk`, `dv`, `dq` and the gradients of gains and biases from `dout` and what the
/// forward pass took and wrote.
///
/// # Safety
/// As for `trencadis_pool_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_pool_backward(
    kernels: *const Handle,
    stream: *mut c_void,
    pool: *const Pool,
) -> Status {
    // SAFETY: as the caller promises.
    guard(|| unsafe {
        let call = Call::new(kernels, pool)?;
        call.launch_backward(&borrow(&call.device, stream)?)
    })
}

/// What the number at `fault` says, once it has been copied to the host: 0 is fine, others are an invalid argument with a
/// sentence.
#[unsafe(no_mangle)]
pub extern "C" fn trencadis_pool_fault(number: i32) -> Status {
    guard(|| Ok(fault(number)?))
}
