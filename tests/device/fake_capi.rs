//! The functions of C in an engine that owns context, stream and memory, over the fake driver: what a launch asks the
//! driver for, and what belongs to somebody else.

use std::ffi::c_void;
use std::ptr::{null_mut, with_exposed_provenance_mut};

use bytemuck::Zeroable;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use trencadis::capi::*;

use crate::fake::INSIDE;
use crate::fake_training::Place;

const WIDTH: usize = 64;

fn address<T>(memory: &CudaSlice<u8>, stream: &CudaStream) -> *mut T {
    with_exposed_provenance_mut(memory.device_ptr(stream).0 as usize)
}

fn raw(stream: &CudaStream) -> *mut c_void {
    stream.cu_stream().cast()
}

/// A call as one thread hands it to another.
struct Shared(Norm, *mut c_void, *mut Handle);

// SAFETY: addresses, a stream and a handle, which the driver and the library take on any thread.
unsafe impl Send for Shared {}

#[track_caller]
fn refused(found: Status, status: Status, part: &str) {
    let mut text = [0u8; 1000];
    // SAFETY: as large as is said.
    let length = unsafe { trencadis_last_error(text.as_mut_ptr().cast(), text.len()) };
    let message = str::from_utf8(&text[..length]).unwrap();
    assert!(found == status && message.contains(part), "{found:?}, `{part}` is not in: {message}");
}

#[test]
fn a_launch_of_c_queues_kernels_alone() {
    let place = Place::new();
    let parameters = place.0.path().join("parameters");
    let settings = [("FAKE_CUDA_PARAMETERS", parameters.to_str().unwrap()), ("FAKE_CUDA_DEVICES", "2")];
    let log = place.0.runs_test("fake_capi::an_engine_of_c", &settings);
    // Between the engine's last allocation and its first free.
    let from = log.iter().rposition(|line| line.starts_with("alloc")).unwrap() + 1;
    let to = log.iter().position(|line| line.starts_with("free")).unwrap();
    let (loads, launches): (Vec<_>, Vec<_>) = log[from..to].iter().partition(|line| line.contains("load "));
    assert!(!loads.is_empty() && launches.len() == 2, "{log:#?}");
    assert!(
        launches.iter().all(|line| line.starts_with("launch norm_forward_") && line.contains(" on 2,")),
        "{log:#?}"
    );
}

#[test]
#[ignore = "for a process that has the fake driver: a_launch_of_c_queues_kernels_alone"]
fn an_engine_of_c() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let mut kernels = null_mut();
    // SAFETY of all calls: structs and memory that live longer; what does not exist is refused.
    let mut open = || unsafe { trencadis_open_current(&raw mut kernels) };
    assert_eq!(trencadis::device::Device::cuda_count().unwrap(), 2);
    refused(open(), Status::NoDevice, "no CUDA context is current on this thread");

    let engine = |ordinal| {
        let context = CudaContext::new(ordinal).unwrap();
        // SAFETY: one stream uses everything.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().unwrap();
        (context, stream)
    };
    let (_other_context, other) = engine(1);
    let (context, stream) = engine(0);
    let elsewhere = other.alloc_zeros::<u8>(8 * WIDTH * 2).unwrap();
    context.bind_to_thread().unwrap();
    assert_eq!(open(), Status::Ok);
    let [x, y] = [(); 2].map(|()| stream.alloc_zeros::<u8>(8 * WIDTH * 2).unwrap());
    let stats = stream.alloc_zeros::<u8>(8 * 2 * 4).unwrap();
    let norm = Norm {
        size: size_of::<Norm>() as u64,
        tokens: 8,
        width: WIDTH as u64,
        eps: 1e-6,
        x: address::<c_void>(&x, &stream),
        y: address(&y, &stream),
        stats: address(&stats, &stream),
        ..Norm::zeroed()
    };
    let launch = |stream: *mut c_void, norm: &Norm| unsafe { trencadis_norm_forward(kernels, stream, norm) };
    assert_eq!(launch(raw(&stream), &norm), Status::Ok);
    let invalid = Status::InvalidArgument;
    let (host, foreign) = ([0u128; 64], address::<c_void>(&elsewhere, &other));
    refused(launch(raw(&other), &norm), invalid, "the stream belongs to another CUDA context");
    for (wrong, part) in [
        (Norm { x: host.as_ptr().cast(), ..norm }, "norm: x: the address"),
        (Norm { y: foreign, ..norm }, "norm: y: the memory at"),
        (Norm { tokens: 9, ..norm }, "were lent and the allocation has 1024"),
        (Norm { x: norm.x.wrapping_byte_add(16), ..norm }, "were lent and the allocation has 1008"),
    ] {
        refused(launch(raw(&stream), &wrong), invalid, part);
    }
    // Another thread, which has no context.
    let shared = Shared(norm, raw(&stream), kernels);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let Shared(norm, stream, kernels) = &shared;
            assert_eq!(unsafe { trencadis_norm_forward(*kernels, *stream, norm) }, Status::Ok);
        });
    });
    assert_eq!(trencadis_close(kernels), Status::Ok);
    refused(trencadis_close(kernels), invalid, "are not open");
}
