//! Packed attention as an operation that candle differentiates.

use std::sync::{Arc, Mutex};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use half::bf16;
use trencadis::device::Buffer;

use crate::attention::{Packed, told};
use crate::place::{Extent, Fresh, extent, host, host_mut};
#[cfg(feature = "cuda")]
use crate::place::{gpu, gpu_mut};

pub struct Attend {
    packed: Arc<Packed>,
    /// Kept by the forward pass for the backward pass.
    lse: Mutex<Option<Buffer<f32>>>,
}

impl Attend {
    pub fn new(packed: Arc<Packed>) -> Self {
        Self { packed, lse: Mutex::new(None) }
    }

    fn run(&self, operands: [(Extent, &Layout); 3], out: Extent) -> Result<()> {
        let [q, k, v] = operands.map(|(extent, layout)| self.packed.lend(extent, layout));
        let (q, k, v, out) = (q?, k?, v?, self.packed.lend_dense(out)?);
        let lse = self.packed.forward([&q, &k, &v], &out)?;
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
        let mut out = vec![bf16::ZERO; shape.elem_count()];
        self.run([(host(q)?, lq), (host(k)?, lk), (host(v)?, lv)], host_mut(&mut out))?;
        Ok((CpuStorage::BF16(out), shape))
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
        let (shape, stream) = (self.packed.shape(), q.device.cuda_stream());
        // SAFETY: all of it is written.
        let mut out = unsafe { q.device.alloc::<bf16>(shape.elem_count())? };
        self.run([(gpu(q)?, lq), (gpu(k)?, lk), (gpu(v)?, lv)], gpu_mut(&mut out, &stream))?;
        Ok((CudaStorage::wrap_cuda_slice(out, q.device.clone()), shape))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (packed, shape) = (&self.packed, self.packed.shape());
        let lse = self.lse.lock().map_err(told)?;
        let Some(lse) = lse.as_ref() else { candle_core::bail!("the forward pass comes first") };
        let fresh = || Fresh::new(q.device(), shape.elem_count());
        let (mut dq, mut dk, mut dv) = (fresh()?, fresh()?, fresh()?);
        let dout = dout.contiguous()?;
        {
            // Nobody else writes to what is read while these are held.
            let storages = [q, k, v, out, &dout].map(|x| x.storage_and_layout());
            let lent = storages.each_ref().map(|(storage, layout)| packed.lend(extent(storage)?, layout));
            let [q, k, v, out, dout] = lent;
            let (q, k, v, out, dout) = (q?, k?, v?, out?, dout?);
            let to_q = packed.lend_dense(dq.extent())?;
            let to_k = packed.lend_dense(dk.extent())?;
            let to_v = packed.lend_dense(dv.extent())?;
            packed.backward([&q, &k, &v, &out, &dout], lse, [&to_q, &to_k, &to_v])?;
        }
        let [dq, dk, dv] = [dq, dk, dv].map(|x| Some(x.into_tensor(shape.clone())));
        Ok((dq, dk, dv))
    }
}
