//! Where a tensor of candle lies, and the kernels for that place.

#[cfg(feature = "cuda")]
use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop,
};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, Error, Result, Shape, Storage, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaDevice, CudaStorage};
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

#[cfg(feature = "cuda")]
type Guard<'a> = SyncOnDrop<'a>;
#[cfg(not(feature = "cuda"))]
type Guard<'a> = &'a ();

/// Memory of elements, until the launch that uses it is queued.
pub struct Extent<'a> {
    /// Of the first element.
    pub address: u64,
    /// Elements.
    pub len: usize,
    /// cudarc's: when it is dropped, what the stream has been given by then is noted for other streams to wait for.
    _guard: Option<Guard<'a>>,
}

/// To read.
pub fn host(storage: &CpuStorage) -> Result<Extent<'_>> {
    match storage {
        CpuStorage::BF16(x) => Ok(Extent { address: x.as_ptr() as u64, len: x.len(), _guard: None }),
        _ => candle_core::bail!("expected tensors of bf16"),
    }
}

/// To write.
pub fn host_mut(elements: &mut [bf16]) -> Extent<'_> {
    Extent { address: elements.as_mut_ptr() as u64, len: elements.len(), _guard: None }
}

/// To read.
#[cfg(feature = "cuda")]
pub fn gpu(storage: &CudaStorage) -> Result<Extent<'_>> {
    let slice = storage.as_cuda_slice::<bf16>()?;
    let (address, guard) = slice.device_ptr(slice.stream());
    Ok(Extent { address, len: slice.len(), _guard: Some(guard) })
}

/// To write.
#[cfg(feature = "cuda")]
pub fn gpu_mut<'a>(slice: &'a mut CudaSlice<bf16>, stream: &'a CudaStream) -> Extent<'a> {
    let len = slice.len();
    let (address, guard) = slice.device_ptr_mut(stream);
    Extent { address, len, _guard: Some(guard) }
}

/// To read.
pub fn extent(storage: &Storage) -> Result<Extent<'_>> {
    match storage {
        Storage::Cpu(storage) => host(storage),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => gpu(storage),
        _ => candle_core::bail!("tensors of {:?} need the feature cuda", storage.device().location()),
    }
}

/// Memory to write, before it is a tensor: a tensor's own may be read by others at any time.
pub enum Fresh {
    Host(Vec<bf16>),
    #[cfg(feature = "cuda")]
    Gpu {
        slice: CudaSlice<bf16>,
        device: CudaDevice,
        stream: Arc<CudaStream>,
    },
}

impl Fresh {
    /// `len` elements, of any value.
    pub fn new(place: &candle_core::Device, len: usize) -> Result<Self> {
        match place {
            candle_core::Device::Cpu => Ok(Self::Host(vec![bf16::ZERO; len])),
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(device) => {
                // SAFETY: the launch writes all of it.
                let slice = unsafe { device.alloc::<bf16>(len)? };
                Ok(Self::Gpu { slice, device: device.clone(), stream: device.cuda_stream() })
            }
            other => candle_core::bail!("tensors on {:?} need the feature cuda", other.location()),
        }
    }

    pub fn extent(&mut self) -> Extent<'_> {
        match self {
            Self::Host(elements) => host_mut(elements),
            #[cfg(feature = "cuda")]
            Self::Gpu { slice, stream, .. } => gpu_mut(slice, stream),
        }
    }

    pub fn into_tensor(self, shape: Shape) -> Tensor {
        let storage = match self {
            Self::Host(elements) => Storage::Cpu(CpuStorage::BF16(elements)),
            #[cfg(feature = "cuda")]
            Self::Gpu { slice, device, .. } => Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device)),
        };
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    }
}
