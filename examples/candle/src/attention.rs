//! Packed attention as an operation of candle: images of any lengths in one sequence, no mask, no padding, forward and
//! backward. Kernels run on candle's stream and memory.

use std::sync::{Arc, Mutex};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Error, Layout, Result, Shape, Tensor};
use half::bf16;
use trencadis::device::{Buffer, Device, Ptr, Stream};
use trencadis::kernels::Rows;
use trencadis::kernels::attention::{Attention, Backward, BackwardPlan, Forward, ForwardPlan, Schedule};
use trencadis::ops::{AttentionConfig, QkNormKind, Rope};

#[cfg(feature = "cuda")]
use crate::place::gpu;
use crate::place::{Extent, extent, host, open};

fn told(error: impl std::fmt::Display) -> Error {
    Error::Msg(error.to_string())
}

/// What all layers share: the work lists of one batch, made once.
pub struct Packed {
    device: Device,
    stream: Stream,
    attention: Attention,
    plans: (ForwardPlan, BackwardPlan),
    cu_seqlens: Buffer<i32>,
    schedules: (Schedule, Schedule),
    workspace: Buffer<u8>,
}

impl Packed {
    /// For images that begin at rows `cu_seqlens[..n]` of tensors of `tokens` rows on `place`, and end at `cu_seqlens[1..]`.
    pub fn new(
        place: &candle_core::Device,
        heads: usize,
        head_dim: usize,
        tokens: usize,
        cu_seqlens: &[i32],
    ) -> Result<Arc<Self>> {
        let (device, stream) = open(place)?;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let config = AttentionConfig {
            heads,
            kv_heads: heads,
            head_dim,
            scale,
            norm: QkNormKind::None,
            eps: 1e-6,
            gain_per_head: false,
            rope: Rope::None,
        };
        let attention = Attention { config, tokens, slots: cu_seqlens.len() - 1 };
        let info = device.info();
        let plans = (attention.plan(info).map_err(told)?, attention.backward_plan(info).map_err(told)?);
        let bytes = attention.forward_workspace_bytes(&plans.0, tokens);
        let bytes = bytes.max(attention.backward_workspace_bytes(&plans.1, tokens, false));
        let schedule = |limits| Schedule::new(&device, limits, tokens, attention.slots).map_err(told);
        let schedules = (schedule(plans.0.limits)?, schedule(plans.1.limits)?);
        let starts = device.upload(cu_seqlens).map_err(told)?;
        for schedule in [&schedules.0, &schedules.1] {
            schedule.launch(&stream, &starts, Some(cu_seqlens)).map_err(told)?;
        }
        let workspace = device.alloc(bytes).map_err(told)?;
        Ok(Arc::new(Self { device, stream, attention, plans, cu_seqlens: starts, schedules, workspace }))
    }

    /// `softmax(q kᵀ / √head_dim) v` within each image; q, k, v and the result are bf16 `[tokens, heads, head_dim]`, rows may
    /// be those of a wider tensor.
    pub fn attend(self: &Arc<Self>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        q.apply_op3(k, v, Attend { packed: self.clone(), lse: Mutex::new(None) })
    }

    fn shape(&self) -> Shape {
        let AttentionConfig { heads, head_dim, .. } = self.attention.config;
        (self.attention.tokens, heads, head_dim).into()
    }

    /// Lends a tensor's memory, from its first element on, and tells the distance of its rows.
    fn lend(&self, (address, len): Extent, layout: &Layout) -> Result<(Buffer<bf16>, usize)> {
        let &[row, head, 1] = layout.stride() else {
            candle_core::bail!("columns of a head must lie side by side")
        };
        if layout.shape() != &self.shape() || head != self.attention.config.head_dim {
            candle_core::bail!("expected [tokens, heads, head_dim] = {:?}, got {layout:?}", self.shape());
        }
        let first = Ptr::<bf16>::from_raw(address).offset(layout.start_offset());
        // SAFETY: candle keeps the tensor until this call is over, and its stream orders what comes after.
        let buffer = unsafe { Buffer::from_raw(&self.device, first, len - layout.start_offset()) };
        Ok((buffer.map_err(told)?, row))
    }

    fn lend_tensor(&self, x: &Tensor) -> Result<(Buffer<bf16>, usize)> {
        let (storage, layout) = x.storage_and_layout();
        self.lend(extent(&storage)?, layout)
    }

    fn forward(&self, [q, k, v, out]: [&(Buffer<bf16>, usize); 4]) -> Result<Buffer<f32>> {
        let lse = self.device.alloc(self.attention.tokens * self.attention.config.heads).map_err(told)?;
        let operands = Forward {
            q: rows(q),
            k: rows(k),
            v: rows(v),
            affine: [None; 4],
            rope: None,
            cu_seqlens: &self.cu_seqlens,
            schedule: &self.schedules.0,
            out: rows(out),
            lse: &lse,
            statistics: None,
            workspace: Some(&self.workspace),
        };
        self.attention.forward(&self.stream, &self.plans.0, &operands).map_err(told)?;
        Ok(lse)
    }
}

fn rows((buffer, stride): &(Buffer<bf16>, usize)) -> Rows<'_, bf16> {
    Rows { buffer, offset: 0, stride: *stride }
}

struct Attend {
    packed: Arc<Packed>,
    /// Kept by the forward pass for the backward pass.
    lse: Mutex<Option<Buffer<f32>>>,
}

impl Attend {
    fn run(&self, operands: [(Extent, &Layout); 3], out: Extent) -> Result<()> {
        let [q, k, v] = operands.map(|(extent, layout)| self.packed.lend(extent, layout));
        let out = self.packed.lend(out, &Layout::contiguous(self.packed.shape()))?;
        let lse = self.packed.forward([&q?, &k?, &v?, &out])?;
        *self.lse.lock().map_err(told)? = Some(lse);
        Ok(())
    }
}

impl CustomOp3 for Attend {
    fn name(&self) -> &'static str {
        "trencadis-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = self.packed.shape();
        let out = CpuStorage::BF16(vec![bf16::ZERO; shape.elem_count()]);
        self.run([(host(q)?, lq), (host(k)?, lk), (host(v)?, lv)], host(&out)?)?;
        Ok((out, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        lq: &Layout,
        k: &CudaStorage,
        lk: &Layout,
        v: &CudaStorage,
        lv: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let shape = self.packed.shape();
        // SAFETY: all of it is written.
        let out = unsafe { q.device.alloc::<bf16>(shape.elem_count())? };
        let out = CudaStorage::wrap_cuda_slice(out, q.device.clone());
        self.run([(gpu(q)?, lq), (gpu(k)?, lk), (gpu(v)?, lv)], gpu(&out)?)?;
        Ok((out, shape))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let packed = &self.packed;
        let lse = self.lse.lock().map_err(told)?;
        let Some(lse) = lse.as_ref() else { candle_core::bail!("the forward pass comes first") };
        let grads = [q, k, v].map(|x| Tensor::zeros(x.shape(), DType::BF16, x.device()));
        let [dq, dk, dv] = grads;
        let (dq, dk, dv, dout) = (dq?, dk?, dv?, dout.contiguous()?);
        let lent = [q, k, v, out, &dout, &dq, &dk, &dv].map(|x| packed.lend_tensor(x));
        let [q, k, v, out, dout, to_q, to_k, to_v] = lent;
        let operands = Backward {
            q: rows(&q?),
            k: rows(&k?),
            v: rows(&v?),
            out: rows(&out?),
            lse,
            dout: rows(&dout?),
            affine: [None; 4],
            rope: None,
            cu_seqlens: &packed.cu_seqlens,
            schedule: &packed.schedules.1,
            dq: rows(&to_q?),
            dk: rows(&to_k?),
            dv: rows(&to_v?),
            daffine: [None; 4],
            accumulate: None,
            workspace: &packed.workspace,
        };
        packed.attention.backward(&packed.stream, &packed.plans.1, &operands).map_err(told)?;
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}
