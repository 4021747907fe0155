//! Packed attention on tensors of candle: images of any lengths in one sequence, no mask, no padding, forward and
//! backward. Kernels run on candle's stream and memory.

use std::sync::{Arc, Mutex};

use candle_core::{Error, Layout, Result, Shape, Tensor};
use half::bf16;
use trencadis::device::{Buffer, Device, Ptr, Stream};
use trencadis::kernels::Rows;
use trencadis::kernels::attention::{Attention, Backward, BackwardPlan, Forward, ForwardPlan, Schedule};
use trencadis::ops::AttentionConfig;

use crate::operation::Attend;
use crate::place::{Extent, open};

pub fn told(error: impl std::fmt::Display) -> Error {
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
    /// Of one pass after another, as the stream has them: locked while a pass is being queued, so that kernels of two
    /// passes do not alternate.
    workspace: Mutex<Buffer<u8>>,
}

/// A tensor's memory lent to a launch, from its first element on, and the distance of its rows.
pub struct Lent<'a> {
    buffer: Buffer<bf16>,
    stride: usize,
    /// Dropped after the launch.
    _extent: Extent<'a>,
}

impl Lent<'_> {
    fn rows(&self) -> Rows<'_, bf16> {
        Rows { buffer: &self.buffer, offset: 0, stride: self.stride }
    }
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
        if cu_seqlens.len() < 2 {
            candle_core::bail!(
                "cu_seqlens has {} numbers; give the start of each image and the end of the last one",
                cu_seqlens.len()
            );
        }
        let (device, stream) = open(place)?;
        let config = AttentionConfig::new(heads, head_dim);
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
        let workspace = Mutex::new(device.alloc(bytes).map_err(told)?);
        Ok(Arc::new(Self { device, stream, attention, plans, cu_seqlens: starts, schedules, workspace }))
    }

    /// `softmax(q kᵀ / √head_dim) v` within each image; q, k, v and the result are bf16 `[tokens, heads, head_dim]`, rows may
    /// be those of a wider tensor.
    pub fn attend(self: &Arc<Self>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        q.apply_op3(k, v, Attend::new(self.clone()))
    }

    pub fn shape(&self) -> Shape {
        let AttentionConfig { heads, head_dim, .. } = self.attention.config;
        (self.attention.tokens, heads, head_dim).into()
    }

    /// Lends what has this layout.
    pub fn lend<'a>(&self, extent: Extent<'a>, layout: &Layout) -> Result<Lent<'a>> {
        let &[row, head, 1] = layout.stride() else {
            candle_core::bail!("columns of a head must lie side by side")
        };
        if layout.shape() != &self.shape() || head != self.attention.config.head_dim {
            candle_core::bail!("expected [tokens, heads, head_dim] = {:?}, got {layout:?}", self.shape());
        }
        let first = Ptr::<bf16>::from_raw(extent.address).offset(layout.start_offset());
        // SAFETY: the extent keeps the memory until the launch is queued, and candle's stream orders what comes after.
        let buffer = unsafe { Buffer::from_raw(&self.device, first, extent.len - layout.start_offset()) };
        Ok(Lent { buffer: buffer.map_err(told)?, stride: row, _extent: extent })
    }

    /// Lends what is written: rows that follow one another.
    pub fn lend_dense<'a>(&self, extent: Extent<'a>) -> Result<Lent<'a>> {
        self.lend(extent, &Layout::contiguous(self.shape()))
    }

    /// Writes `out`; what the backward pass needs besides.
    pub fn forward(&self, [q, k, v]: [&Lent; 3], out: &Lent) -> Result<Buffer<f32>> {
        let lse = self.device.alloc(self.attention.tokens * self.attention.config.heads).map_err(told)?;
        let workspace = self.workspace.lock().map_err(told)?;
        let operands = Forward {
            q: q.rows(),
            k: k.rows(),
            v: v.rows(),
            affine: [None; 4],
            rope: None,
            cu_seqlens: &self.cu_seqlens,
            schedule: &self.schedules.0,
            out: out.rows(),
            lse: &lse,
            statistics: None,
            workspace: Some(&*workspace),
        };
        self.attention.forward(&self.stream, &self.plans.0, &operands).map_err(told)?;
        Ok(lse)
    }

    /// Writes `dq`, `dk` and `dv`.
    pub fn backward(
        &self,
        [q, k, v, out, dout]: [&Lent; 5],
        lse: &Buffer<f32>,
        [dq, dk, dv]: [&Lent; 3],
    ) -> Result<()> {
        let workspace = self.workspace.lock().map_err(told)?;
        let operands = Backward {
            q: q.rows(),
            k: k.rows(),
            v: v.rows(),
            out: out.rows(),
            lse,
            dout: dout.rows(),
            affine: [None; 4],
            rope: None,
            cu_seqlens: &self.cu_seqlens,
            schedule: &self.schedules.1,
            dq: dq.rows(),
            dk: dk.rows(),
            dv: dv.rows(),
            daffine: [None; 4],
            accumulate: None,
            workspace: &workspace,
        };
        self.attention.backward(&self.stream, &self.plans.1, &operands).map_err(told)
    }
}
