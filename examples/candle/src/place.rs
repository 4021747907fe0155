//! Where a tensor of candle lies, and the kernels for that place.

use candle_core::{CpuStorage, Error, Result, Storage};
use half::bf16;
use trencadis::device::{Device, Stream};

/// Kernels for the device of candle's tensors, and candle's stream on it.
pub fn open(place: &candle_core::Device) -> Result<(Device, Stream)> {
    match place {
        #[cfg(feature = "emulator")]
        candle_core::Device::Cpu => {
            let device = Device::emulator(Default::default());
            let stream = device.stream().map_err(Error::wrap)?;
            Ok((device, stream))
        }
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => {
            let theirs = device.cuda_stream();
            theirs.context().bind_to_thread().map_err(Error::wrap)?;
            let device = Device::current().map_err(Error::wrap)?;
            let raw = trencadis::device::RawStream(theirs.cu_stream().cast());
            // SAFETY: candle keeps the stream for as long as its device, which the caller's tensors keep.
            let stream = unsafe { device.borrow_stream(raw) }.map_err(Error::wrap)?;
            Ok((device, stream))
        }
        other => candle_core::bail!("tensors on {:?} need the feature cuda or emulator", other.location()),
    }
}

/// Address of the first element of a storage, and how many there are.
pub type Extent = (u64, usize);

pub fn host(storage: &CpuStorage) -> Result<Extent> {
    match storage {
        CpuStorage::BF16(x) => Ok((x.as_ptr() as u64, x.len())),
        _ => candle_core::bail!("expected tensors of bf16"),
    }
}

#[cfg(feature = "cuda")]
pub fn gpu(storage: &candle_core::CudaStorage) -> Result<Extent> {
    use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DeviceSlice};
    let slice = storage.as_cuda_slice::<bf16>()?;
    let stream = storage.device.cuda_stream();
    let (address, _ordered) = slice.device_ptr(&stream);
    Ok((address, slice.len()))
}

pub fn extent(storage: &Storage) -> Result<Extent> {
    match storage {
        Storage::Cpu(storage) => host(storage),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => gpu(storage),
        _ => candle_core::bail!("tensors of {:?} need the feature cuda", storage.device().location()),
    }
}
