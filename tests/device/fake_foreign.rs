//! Checked launches in an engine that owns context, stream and memory, here cudarc's, over the fake driver: what they
//! ask the driver for, and what cannot be lent.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use trencadis::device::{Buffer, Device, Ptr, RawStream};

use crate::fake::{Fake, INSIDE};

fn engine(ordinal: usize) -> (Arc<CudaContext>, Arc<CudaStream>) {
    let context = CudaContext::new(ordinal).unwrap();
    // SAFETY: one stream uses everything.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    (context, stream)
}

fn raw(stream: &CudaStream) -> RawStream {
    RawStream(stream.cu_stream().cast())
}

fn address(memory: &CudaSlice<u8>, stream: &CudaStream) -> u64 {
    memory.device_ptr(stream).0
}

/// A line of our own in the driver's log.
fn mark(text: &str) {
    let mut log = OpenOptions::new().append(true).open(std::env::var_os("FAKE_CUDA_LOG").unwrap()).unwrap();
    writeln!(log, "{text}").unwrap();
}

#[test]
fn what_cannot_be_lent_is_one_sentence() {
    let fake = Fake::new();
    fake.runs_test("fake_foreign::refusals", &[("FAKE_CUDA_DEVICES", "2")]);
    fake.runs_test(
        "fake_foreign::memory_of_no_context",
        &[("FAKE_CUDA_DEVICES", "2"), ("FAKE_CUDA_UNOWNED", "1")],
    );
}

#[test]
#[ignore = "for a process that has the fake driver: what_cannot_be_lent_is_one_sentence"]
fn refusals() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    // The driver starts before there is an engine.
    assert_eq!(Device::cuda_count().unwrap(), 2);
    let error = Device::current().err().unwrap();
    assert!(error.to_string().starts_with("no CUDA context is current on this thread"), "{error}");

    let (_other_context, other) = engine(1);
    let (context, stream) = engine(0);
    let elsewhere = other.alloc_zeros::<u8>(4096).unwrap();
    context.bind_to_thread().unwrap();
    let device = Device::current().unwrap();
    let memory = stream.alloc_zeros::<u8>(1000).unwrap();
    let (at, host) = (address(&memory, &stream), [0u128; 1]);
    // SAFETY: the memory lives until the end of the test; what does not exist is refused.
    let lend =
        |address: u64, len: usize| unsafe { Buffer::<u8>::from_raw(&device, Ptr::from_raw(address), len) };
    for (address, len, part) in [
        (0, 4, "is null; lend the memory"),
        (at + 8, 4, "is not a multiple of 16 bytes"),
        (host.as_ptr() as u64, 16, "is no memory that the GPU knows"),
        (address(&elsewhere, &other), 16, "belongs to another CUDA context"),
        (at, 1001, "1001 bytes at"),
        (at + 16, 985, "has 984 from there on"),
    ] {
        let error = lend(address, len).err().unwrap();
        assert!(
            error.to_string().contains(part) && error.exit_code() == 2,
            "`{part}` is missing in: {error}"
        );
        assert_eq!(error.to_string().lines().count(), 1);
    }
    assert_eq!((lend(at, 1000).unwrap().len(), lend(at + 16, 984).unwrap().len()), (1000, 984));
    drop(memory);
    assert!(lend(at, 16).err().unwrap().to_string().contains("or freed"));

    // SAFETY: both streams are alive.
    let error = unsafe { device.borrow_stream(raw(&other)) }.err().unwrap();
    assert!(error.to_string().contains("the stream belongs to another CUDA context"), "{error}");
    // SAFETY: as above; null is the default stream of the context.
    let streams =
        unsafe { [raw(&stream), RawStream(std::ptr::null_mut())].map(|raw| device.borrow_stream(raw)) };
    for (stream, raw) in streams.into_iter().zip([stream.cu_stream(), std::ptr::null_mut()]) {
        assert_eq!(stream.unwrap().raw().0, raw.cast());
    }
}

#[test]
#[ignore = "for a process that has the fake driver: what_cannot_be_lent_is_one_sentence"]
fn memory_of_no_context() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let (_other_context, other) = engine(1);
    let (context, stream) = engine(0);
    let [here, there] = [&stream, &other].map(|stream| stream.alloc_zeros::<u8>(64).unwrap());
    context.bind_to_thread().unwrap();
    let device = Device::current().unwrap();
    // SAFETY: the memory lives until the end of the test.
    let lend = |address| unsafe { Buffer::<u8>::from_raw(&device, Ptr::from_raw(address), 64) };
    lend(address(&here, &stream)).unwrap();
    let error = lend(address(&there, &other)).err().unwrap();
    assert!(error.to_string().contains("lies on GPU 1 and the device is GPU 0"), "{error}");
}

#[test]
fn an_engine_keeps_its_context_streams_and_memory() {
    let log = Fake::new().runs_test("fake_foreign::an_engine", &[]);
    let at =
        |mark: &str| log.iter().position(|line| line == mark).unwrap_or_else(|| panic!("{mark}: {log:#?}"));
    assert!(log[at("opened")..at("lent")].is_empty() || at("lent") == at("opened") + 1, "{log:#?}");
    // What the device takes for itself, it takes when it is asked to, and gives back.
    let own: Vec<&str> =
        log[at("lent")..at("closed")].iter().map(|line| line.split(',').next().unwrap()).collect();
    assert_eq!(
        own,
        [
            "lent",
            "stream",
            "alloc 4001",
            "host waits for stream 2",
            "host waits for everything",
            "free 4001",
            "end of stream"
        ]
    );
    // The engine's own follow, and its context is still there.
    let rest: Vec<&str> = log[at("closed") + 1..].iter().map(String::as_str).collect();
    assert_eq!(rest, ["free 1000", "end of stream", "release 0"], "{log:#?}");
}

#[test]
#[ignore = "for a process that has the fake driver: an_engine_keeps_its_context_streams_and_memory"]
fn an_engine() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let (_context, stream) = engine(0);
    let memory = stream.alloc_zeros::<u8>(1000).unwrap();
    mark("opened");
    let device = Device::current().unwrap();
    // SAFETY: memory and stream live longer.
    let (buffer, borrowed) = unsafe {
        let buffer = Buffer::<u8>::from_raw(&device, Ptr::from_raw(address(&memory, &stream)), 1000).unwrap();
        (buffer, device.borrow_stream(raw(&stream)).unwrap())
    };
    assert_eq!((buffer.len(), device.allocated_bytes()), (1000, 0));
    drop((buffer, borrowed));
    mark("lent");
    drop(device.alloc::<u8>(4001).unwrap());
    drop(device);
    mark("closed");
}

#[cfg(feature = "emulator")]
mod launches {
    use cudarc::driver::sys;
    use trencadis::device::Kernels;

    use super::*;
    use crate::fake_training::Place;
    use crate::foreign::{OPERANDS, Problem};

    #[test]
    fn launches_allocate_nothing_and_never_wait() {
        let place = Place::new();
        let parameters = place.0.path().join("parameters");
        let settings = [("FAKE_CUDA_PARAMETERS", parameters.to_str().unwrap())];
        let log = place.0.runs_test("fake_foreign::launches::on_lent_memory", &settings);
        let at = |mark: &str| log.iter().position(|line| line == mark).unwrap();
        // Loaded beforehand, all that a launch may need.
        assert!(log[..at("plain")].iter().any(|line| line.starts_with("load ")), "{log:#?}");
        let kinds = |from: &str, to: &str| -> Vec<String> {
            let lines = log[at(from) + 1..at(to)].iter();
            lines.map(|line| line.split(", first").next().unwrap().to_string()).collect()
        };
        let plain = kinds("plain", "capture");
        assert!(
            plain.len() >= 4 && plain.iter().all(|line| line.starts_with("launch attention_")),
            "{plain:#?}"
        );
        let mut captured = kinds("capture", "end");
        assert!(captured.remove(0).starts_with("capture, mode 0"), "as engines capture by default");
        assert_eq!(captured.pop().unwrap(), format!("captured {} launches", plain.len()));
        assert_eq!(plain, captured);
        assert!(plain.iter().all(|line| line.ends_with(" on 1")), "the engine's stream: {plain:#?}");
    }

    #[test]
    #[ignore = "for a process that has the fake driver: launches_allocate_nothing_and_never_wait"]
    fn on_lent_memory() {
        if std::env::var_os(INSIDE).is_none() {
            return;
        }
        let (_context, stream) = engine(0);
        let device = Device::current().unwrap();
        device.kernels().preload(|name| name.starts_with("attention_")).unwrap();
        let problem = Problem::new(&device);
        let memory = OPERANDS.map(|operand| stream.alloc_zeros::<u8>(problem.bytes(operand).max(1)).unwrap());
        // SAFETY: the stream lives longer.
        let borrowed = unsafe { device.borrow_stream(raw(&stream)) }.unwrap();
        mark("plain");
        problem.launch(&borrowed, |operand| address(&memory[operand as usize], &stream));
        mark("capture");
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
        problem.launch(&borrowed, |operand| address(&memory[operand as usize], &stream));
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap();
        mark("end");
        drop(graph);
        // Raw launches need no device at all.
        assert_eq!(Kernels::for_current_context().unwrap().info(), device.info());
    }
}
