//! Another engine, for the examples: it has a stream and memory of its own. On GPU 0 it is cudarc; where there is none, it is
//! a few vectors of the host, whose kernels the emulator runs.

#![allow(dead_code)] // Each example takes what it needs.

use std::error::Error;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, sys};
use trencadis::device::{Buffer, Device, Ptr, RawStream, Stream};

pub type Outcome<T = ()> = Result<T, Box<dyn Error>>;

pub struct Engine {
    place: Place,
}

enum Place {
    Gpu { stream: Arc<CudaStream>, memory: Vec<CudaSlice<u128>> },
    Host { stream: Stream, memory: Vec<Vec<u128>> },
}

/// An engine, and the kernels as a device of it. None where there is nothing to run them on: then what is missing was said.
pub fn open() -> Outcome<Option<(Engine, Device)>> {
    match Device::cuda(0) {
        Ok(_) => {
            let context = CudaContext::new(0)?;
            // SAFETY: one stream uses all memory. So the guards that `device_ptr` returns have nothing to do.
            unsafe { context.disable_event_tracking() };
            let place = Place::Gpu { stream: context.new_stream()?, memory: Vec::new() };
            // cudarc has made its context current on this thread.
            Ok(Some((Engine { place }, Device::current()?)))
        }
        Err(reason) => without_gpu(&reason),
    }
}

#[cfg(feature = "emulator")]
fn without_gpu(_: &trencadis::Error) -> Outcome<Option<(Engine, Device)>> {
    let device = Device::emulator(Default::default());
    let place = Place::Host { stream: device.stream()?, memory: Vec::new() };
    Ok(Some((Engine { place }, device)))
}

#[cfg(not(feature = "emulator"))]
fn without_gpu(reason: &trencadis::Error) -> Outcome<Option<(Engine, Device)>> {
    println!("nothing was run: {reason}; or build with --features emulator");
    Ok(None)
}

impl Engine {
    /// The stream on which the engine works.
    pub fn stream(&self) -> RawStream {
        match &self.place {
            Place::Gpu { stream, .. } => RawStream(stream.cu_stream().cast()),
            Place::Host { stream, .. } => stream.raw(),
        }
    }

    /// Memory with these elements; its address.
    pub fn upload<T: bytemuck::Pod>(&mut self, elements: &[T]) -> Outcome<u64> {
        let bytes = bytemuck::cast_slice::<T, u8>(elements);
        let mut words = vec![0u128; bytes.len().div_ceil(16).max(1)];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        match &mut self.place {
            Place::Gpu { stream, memory } => {
                memory.push(stream.clone_htod(&words)?);
                Ok(memory[memory.len() - 1].device_ptr(stream).0)
            }
            Place::Host { memory, .. } => {
                let address = words.as_mut_ptr() as u64; // Kernels write there.
                memory.push(words);
                Ok(address)
            }
        }
    }

    /// The same, lent to the kernels.
    pub fn lend<T: bytemuck::Pod>(&mut self, device: &Device, elements: &[T]) -> Outcome<Buffer<T>> {
        let address = self.upload(elements)?;
        // SAFETY: the memory stays until the engine ends, which has waited for all launches by then.
        Ok(unsafe { Buffer::from_raw(device, Ptr::from_raw(address), elements.len())? })
    }

    /// What `len` elements at an address of [`upload`](Self::upload) are, once all that was queued has run.
    pub fn download<T: bytemuck::Pod>(&self, address: u64, len: usize) -> Outcome<Vec<T>> {
        let words = match &self.place {
            Place::Gpu { stream, memory } => {
                let at = memory.iter().find(|slice| slice.device_ptr(stream).0 == address);
                stream.clone_dtoh(at.ok_or("no such memory")?)?
            }
            Place::Host { stream, memory } => {
                stream.synchronize()?;
                memory.iter().find(|words| words.as_ptr() as u64 == address).ok_or("no such memory")?.clone()
            }
        };
        Ok(bytemuck::cast_slice(&bytemuck::cast_slice::<u128, u8>(&words)[..len * size_of::<T>()]).to_vec())
    }

    /// Captures what `work` queues, and then runs it `times` times.
    pub fn capture(&self, times: usize, work: impl FnOnce() -> trencadis::Result<()>) -> Outcome {
        match &self.place {
            Place::Gpu { stream, .. } => {
                stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL)?;
                let done = work();
                let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0))?;
                done?;
                let graph = graph.ok_or("nothing was captured")?;
                (0..times).try_for_each(|_| graph.launch())?;
                Ok(stream.synchronize()?)
            }
            Place::Host { stream, .. } => {
                stream.begin_capture()?;
                work()?;
                let graph = stream.end_capture()?;
                (0..times).try_for_each(|_| graph.launch(stream))?;
                Ok(stream.synchronize()?)
            }
        }
    }
}
