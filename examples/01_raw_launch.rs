//! A raw launch on a stream and memory of cudarc: addresses and a stream go in, nothing is checked, allocated or waited for.
//!
//!     cargo run --no-default-features --features kernels --example 01_raw_launch
//!
//! On GPU 0. Without one the emulator runs it, where the feature `emulator` is on.

use cudarc::driver::{CudaContext, DevicePtr, DevicePtrMut};
use half::bf16;
use trencadis::device::{Device, Kernels, Ptr, RawStream};
use trencadis::kernels::elementwise::{AddParams, launch_add};

const ROWS: usize = 2;
const WIDTH: usize = 8;

/// Queues `out = a + b`, `[ROWS, WIDTH]` each.
///
/// # Safety
/// All that [`launch_add`] asks for: here addresses of bf16 that stay valid until the stream has come so far.
unsafe fn add(kernels: &Kernels, stream: RawStream, [out, a, b]: [u64; 3]) -> trencadis::Result<()> {
    let params = AddParams {
        out: Ptr::from_raw(out),
        a: Ptr::from_raw(a),
        b: Ptr::from_raw(b),
        row: Ptr::null(),
        live: Ptr::null(),
        rows: ROWS as i32,
        width: WIDTH as i32,
    };
    // SAFETY: as the caller promises.
    unsafe { launch_add(kernels, stream, &params) }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let a: Vec<bf16> = (0..ROWS * WIDTH).map(|i| bf16::from_f32(i as f32)).collect();
    let b = vec![bf16::from_f32(0.5); ROWS * WIDTH];
    let sum = match Device::cuda(0) {
        Ok(_) => Ok(on_cudarc(&a, &b)?),
        Err(reason) => without_gpu(&a, &b)?.ok_or(reason),
    };
    match sum {
        Ok(sum) => println!("a + b = {:?}", sum.iter().map(|x| x.to_f32()).collect::<Vec<_>>()),
        Err(reason) => println!("nothing was run: {reason}; or build with --features emulator"),
    }
    Ok(())
}

/// cudarc has no bf16 without more features, so its memory holds the bits.
fn on_cudarc(a: &[bf16], b: &[bf16]) -> Result<Vec<bf16>, Box<dyn std::error::Error>> {
    let stream = CudaContext::new(0)?.new_stream()?;
    // The context that cudarc has made current on this thread. Made once: it holds the loaded kernels.
    let kernels = Kernels::for_current_context()?;
    let [a, b] = [a, b].map(|x| stream.clone_htod(bytemuck::cast_slice::<bf16, u16>(x)));
    let (a, b, mut out) = (a?, b?, stream.alloc_zeros::<u16>(ROWS * WIDTH)?);
    {
        // cudarc's guards note where the stream is when they are dropped, for other streams to wait: after the launch.
        let ((a, _read_a), (b, _read_b)) = (a.device_ptr(&stream), b.device_ptr(&stream));
        let (out, _written) = out.device_ptr_mut(&stream);
        // SAFETY: the slices live until the copy below has waited.
        unsafe { add(&kernels, RawStream(stream.cu_stream().cast()), [out, a, b])? };
    }
    Ok(bytemuck::cast_vec(stream.clone_dtoh(&out)?))
}

#[cfg(feature = "emulator")]
fn without_gpu(a: &[bf16], b: &[bf16]) -> trencadis::Result<Option<Vec<bf16>>> {
    let device = Device::emulator(Default::default());
    let (a, b, out) = (device.upload(a)?, device.upload(b)?, device.zeros::<bf16>(ROWS * WIDTH)?);
    let stream = device.stream()?;
    // SAFETY: the buffers live until the copy below has waited.
    unsafe { add(device.kernels(), stream.raw(), [&out, &a, &b].map(|x| x.ptr().address()))? };
    out.download().map(Some)
}

#[cfg(not(feature = "emulator"))]
fn without_gpu(_: &[bf16], _: &[bf16]) -> trencadis::Result<Option<Vec<bf16>>> {
    Ok(None)
}
