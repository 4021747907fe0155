//! A launch on a stream and memory of `cust`.
//!
//!     cargo run --no-default-features --features cust --example 05_cust
//!
//! cust is linked against libcuda: where there is none, `tools/cuda-stub` makes what stands in for it (docs/embedding.md).

use cust::context::Context;
use cust::memory::{CopyDestination, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use half::bf16;
use trencadis::device::{Device, Kernels, Ptr, RawStream};
use trencadis::kernels::elementwise::{AddParams, launch_add};

const ROWS: usize = 4;
const WIDTH: usize = 8;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Err(reason) = Device::cuda(0) {
        return Ok(println!("nothing was run: {reason}"));
    }
    cust::init(cust::CudaFlags::empty())?;
    // Of cust's contexts the one that all of CUDA shares; it is current from here on.
    let _context = Context::new(cust::device::Device::get_device(0)?)?;
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;
    let kernels = Kernels::for_current_context()?;

    // cust knows the bf16 of half 1.8 alone, so its memory holds the bits.
    let one = DeviceBuffer::from_slice(&[bf16::ONE.to_bits(); ROWS * WIDTH])?;
    let sum = DeviceBuffer::from_slice(&[0u16; ROWS * WIDTH])?;
    let bits = |buffer: &DeviceBuffer<u16>| Ptr::<u16>::from(buffer.as_device_ptr()).cast::<bf16>();
    let params = AddParams {
        out: bits(&sum),
        a: bits(&one),
        b: bits(&one),
        row: Ptr::null(),
        live: Ptr::null(),
        rows: ROWS as i32,
        width: WIDTH as i32,
    };
    // SAFETY: the buffers have that many elements, and live until the stream has been waited for.
    unsafe { launch_add(&kernels, RawStream::from(&stream), &params)? };
    stream.synchronize()?;

    let mut bits = [0u16; ROWS * WIDTH];
    sum.copy_to(&mut bits)?;
    println!("1 + 1 = {}", bf16::from_bits(bits[0]));
    Ok(())
}
