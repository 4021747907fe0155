//! Launches on streams and memory of `cust`, over a driver that runs nothing. Linked with what tools/cuda-stub makes, or with a
//! driver.

mod support {
    pub mod places;
}
#[allow(dead_code)] // Some of it is for the tests of the device.
#[path = "device/fake.rs"]
mod fake;
#[path = "device/fatbins.rs"]
mod fatbins;

use std::fs;

use cust::context::Context;
use cust::memory::DeviceBuffer;
use cust::stream::{Stream, StreamFlags};
use half::bf16;
use trencadis::device::{Buffer, Device, Kernels, Ptr, RawStream};
use trencadis::kernels::elementwise::{Add, AddParams, Addend, launch_add};

use fake::{Fake, INSIDE};

/// Where cust finds the driver as well, and the kernels know their parameters.
fn fake() -> Fake {
    let fake = Fake::new();
    std::os::unix::fs::symlink("libcuda.so", fake.path().join("libcuda.so.1")).unwrap();
    let line = format!("elementwise_add_bf16 {}\n", size_of::<AddParams>());
    fs::write(fake.path().join("parameters"), line).unwrap();
    fake
}

#[test]
fn a_program_starts_without_a_driver() {
    if Device::cuda_count().is_err() {
        assert_eq!(cust::init(cust::CudaFlags::empty()), Err(cust::error::CudaError::NoDevice));
    }
}

#[test]
fn launches_go_to_a_stream_of_cust() {
    let fake = fake();
    let parameters = fake.path().join("parameters");
    let log = fake.runs_test("on_cust", &[("FAKE_CUDA_PARAMETERS", parameters.to_str().unwrap())]);
    let launches: Vec<_> =
        log.iter().filter(|line| line.starts_with("launch elementwise_add_bf16")).collect();
    assert_eq!(launches.len(), 2, "{log:#?}");
    // The second stream of the process, which is the one that was given.
    assert!(launches.iter().all(|line| line.contains(" on 2, first parameter ")), "{launches:#?}");
    let count = |part: &str| log.iter().filter(|line| line.starts_with(part)).count();
    assert_eq!((count("stream, "), count("alloc 64")), (2, 2), "{log:#?}");
}

#[test]
#[ignore = "for a process that has the fake driver: launches_go_to_a_stream_of_cust"]
fn on_cust() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    cust::init(cust::CudaFlags::empty()).unwrap();
    let _context = Context::new(cust::device::Device::get_device(0).unwrap()).unwrap();
    let [_, stream] = [(); 2].map(|()| Stream::new(StreamFlags::DEFAULT, None).unwrap());
    let [out, a] = [(); 2].map(|()| DeviceBuffer::from_slice(&[0u16; 32]).unwrap());
    let [out, a] = [&out, &a].map(|buffer| Ptr::<u16>::from(buffer.as_device_ptr()).cast::<bf16>());
    let params = AddParams { out, a, b: a, row: Ptr::null(), live: Ptr::null(), rows: 4, width: 8 };
    let raw = RawStream::from(&stream);
    assert_eq!(raw.0, stream.as_inner().cast());
    let kernels = Kernels::for_current_context().unwrap();
    // SAFETY: the fake driver runs nothing.
    unsafe { launch_add(&kernels, raw, &params) }.unwrap();

    let device = Device::current().unwrap();
    // SAFETY: stream and memory are cust's, and live longer.
    let (lent, stream) = unsafe {
        let lent = [out, a].map(|at| Buffer::<bf16>::from_raw(&device, at, 32).unwrap());
        (lent, device.borrow_stream(raw).unwrap())
    };
    let add = Add { rows: 4, width: 8 };
    add.launch(&stream, Some(&lent[0]), &lent[1], Addend::Rows(&lent[1]), None).unwrap();
}

#[test]
fn the_example_runs() {
    let fake = fake();
    let mut command = fake.command(example());
    command.env("FAKE_CUDA_PARAMETERS", fake.path().join("parameters"));
    let (done, log) = fake.output(command);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // Nothing has run, so the sum is what it was.
    assert_eq!(String::from_utf8_lossy(&done.stdout), "1 + 1 = 0\n");
    assert!(log.iter().any(|line| line.starts_with("launch elementwise_add_bf16")), "{log:#?}");
}

/// Built before by `cargo build --example 05_cust` with the same features.
fn example() -> std::path::PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().with_file_name("examples").join("05_cust")
}
