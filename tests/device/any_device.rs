//! What holds on every device: the emulator, and a GPU where there is one.

use trencadis::device::{Buffer, Device, DeviceInfo, Launch, Ptr, Stream};

use crate::support::devices::devices;

#[test]
fn memory_keeps_what_is_written() {
    for device in devices() {
        round_trips(&device);
    }
}

/// Copies of every kind, whole and empty.
pub fn round_trips(device: &Device) {
    let values: Vec<f32> = (0..1000).map(|i| i as f32 * 0.25).collect();
    let buffer = device.upload(&values).unwrap();
    assert_eq!(buffer.len(), 1000);
    assert_eq!(buffer.ptr().address() % 256, 0);
    assert_eq!(buffer.download().unwrap(), values);
    assert!(device.zeros::<u64>(77).unwrap().download().unwrap().iter().all(|x| *x == 0));

    let stream = device.stream().unwrap();
    let doubled: Vec<f32> = values.iter().map(|x| x * 2.0).collect();
    buffer.write(&stream, &doubled).unwrap();
    assert_eq!(buffer.download().unwrap(), doubled);

    let mut pinned = device.pinned::<f32>(1000).unwrap();
    assert!(pinned.read().unwrap().iter().all(|x| *x == 0.0));
    pinned.edit().unwrap().copy_from_slice(&values);
    buffer.write_pinned(&stream, &mut pinned).unwrap();
    pinned.edit().unwrap().fill(-1.0);
    buffer.read_pinned(&stream, &mut pinned).unwrap();
    assert_eq!(pinned.read().unwrap(), values);

    for length in [999, 1001] {
        let error = buffer.write(&stream, &vec![0.0; length]).unwrap_err();
        assert!(
            error.to_string().contains(&format!("1000 elements cannot be written with {length}")),
            "{error}"
        );
    }
    let empty = device.upload::<f32>(&[]).unwrap();
    empty.write(&stream, &[]).unwrap();
    assert!(empty.is_empty() && empty.ptr().is_null() && empty.download().unwrap().is_empty());
    let error = device.alloc::<u64>(usize::MAX / 2).err().unwrap();
    assert!(error.to_string().contains("do not fit"), "{error}");
}

#[test]
fn memory_is_counted() {
    // Other tests use the GPU at the same time.
    let quiet = devices().into_iter().filter(|device| device.info().driver.is_none());
    for device in quiet.chain([Device::planned(DeviceInfo::h100())]) {
        counts(&device);
    }
}

/// Buffers count while anything of them lives; pinned host memory does not.
pub fn counts(device: &Device) {
    let (free, begin) = (device.free_bytes().unwrap(), device.allocated_bytes());
    let buffer = device.alloc::<u32>(1000).unwrap();
    let (more, empty) = (device.upload(&[1u8; 77]).unwrap(), device.zeros::<u64>(0).unwrap());
    let pinned = device.pinned::<u64>(100).unwrap();
    assert_eq!((device.allocated_bytes() - begin, pinned.len(), empty.len()), (4077, 100, 0));
    assert_eq!(free - device.free_bytes().unwrap(), 4077);
    let view = buffer.view::<u8>(8..9).unwrap();
    drop((buffer, more));
    assert_eq!(device.allocated_bytes() - begin, 4000, "the view keeps the whole buffer");
    drop(view);
    assert_eq!((device.allocated_bytes(), device.free_bytes().unwrap()), (begin, free));
    assert!(device.alloc::<u64>(usize::MAX / 2).is_err() && device.allocated_bytes() == begin);
}

#[test]
fn views_are_the_same_memory() {
    for device in devices() {
        let words = device.upload(&[1u32, 2, 3, 4]).unwrap();
        let view = words.view::<u16>(4..12).unwrap();
        assert_eq!(view.ptr().address(), words.ptr().address() + 4);
        assert_eq!(view.download().unwrap(), [2, 0, 3, 0]);
        view.write(&device.stream().unwrap(), &[5, 0, 6, 0]).unwrap();
        assert_eq!(words.download().unwrap(), [1, 5, 6, 4]);
        drop(words);
        assert_eq!(view.download().unwrap(), [5, 0, 6, 0]);
        for range in [0..9, 1..3, 0..3] {
            let error = view.view::<u16>(range.clone()).err().unwrap();
            assert!(error.to_string().contains(&format!("bytes {range:?} of a buffer of 8")), "{error}");
        }
    }
}

#[test]
fn streams_and_events_are_ordered() {
    for device in devices() {
        let (one, two) = (device.stream().unwrap(), device.stream().unwrap());
        let start = one.record().unwrap();
        two.wait(&start).unwrap();
        let end = two.record().unwrap();
        one.synchronize().unwrap();
        two.synchronize().unwrap();
        assert!(start.elapsed_ms(&end).unwrap() >= 0.0);
    }
}

#[test]
fn what_cannot_be_captured_is_refused() {
    for device in devices() {
        capture_refuses(&device);
    }
}

/// An empty graph, and everything that must not happen while it is captured.
pub fn capture_refuses(device: &Device) {
    let stream = device.stream().unwrap();
    let buffer = device.zeros::<u32>(4).unwrap();
    let error = stream.end_capture().err().unwrap();
    assert!(error.to_string().contains("no capture is under way"), "{error}");
    stream.begin_capture().unwrap();
    for error in [
        stream.begin_capture().unwrap_err(),
        stream.synchronize().unwrap_err(),
        buffer.write(&stream, &[1; 4]).unwrap_err(),
    ] {
        assert!(error.to_string().contains("cannot be captured; end the capture first"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
    // Memory may come and go meanwhile.
    let other = device.upload(&[7u32; 3]).unwrap();
    drop(device.zeros::<u32>(5).unwrap());
    let graph = stream.end_capture().unwrap();
    assert_eq!(graph.operations().unwrap(), 0);
    graph.launch(&stream).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(buffer.download().unwrap(), [0; 4]);
    assert_eq!(other.download().unwrap(), [7; 3]);
}

#[test]
fn devices_do_not_mix() {
    let all = devices();
    for (i, device) in all.iter().enumerate() {
        let other = &all[(i + 1) % all.len()];
        if all.len() < 2 {
            return;
        }
        let buffer = device.zeros::<u8>(3).unwrap();
        let (stream, foreign) = (device.stream().unwrap(), other.stream().unwrap());
        stream.begin_capture().unwrap();
        let graph = stream.end_capture().unwrap();
        for error in [buffer.write(&foreign, &[1; 3]).unwrap_err(), graph.launch(&foreign).unwrap_err()] {
            assert!(error.to_string().contains("of another device"), "{error}");
        }
    }
}

#[test]
fn a_launch_is_checked_before_it_runs() {
    for device in devices() {
        let stream = device.stream().unwrap();
        for (name, grid, part) in
            [("no_such_kernel", [1, 1, 1], "no_such_kernel"), ("no_such_kernel", [1, 0, 1], "at least 1")]
        {
            // SAFETY: nothing runs.
            let outcome =
                unsafe { device.kernels().launch(name, Launch::new(grid, 32, 0), stream.raw(), &0u64) };
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}

/// Parameters of `measure_copy_bf16`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Copy {
    out: Ptr<u16>,
    x: Ptr<u16>,
    size: i64,
}

/// Queues `to = from` on `stream`.
fn copy(stream: &Stream, from: &Buffer<u16>, to: &Buffer<u16>) {
    let params = Copy { out: to.ptr(), x: from.ptr(), size: from.len() as i64 };
    let blocks = from.len().div_ceil(4 * 256 * 8) as u32;
    // SAFETY: both buffers have `size` elements and outlive the stream's work.
    let outcome = unsafe {
        let launch = Launch::new([blocks, 1, 1], 256, 0);
        stream.device().kernels().launch("measure_copy_bf16", launch, stream.raw(), &params)
    };
    outcome.unwrap();
}

fn ramp(len: usize, seed: u16) -> Vec<u16> {
    (0..len).map(|i| (i as u16).wrapping_mul(31).wrapping_add(seed)).collect()
}

#[test]
fn a_kernel_runs_in_the_order_of_its_stream() {
    for device in devices() {
        let (one, two) = (device.stream().unwrap(), device.stream().unwrap());
        let [a, b, c] = [0; 3].map(|_| device.alloc::<u16>(20_000).unwrap());
        a.write(&one, &ramp(20_000, 1)).unwrap();
        copy(&one, &a, &b);
        two.wait(&one.record().unwrap()).unwrap();
        copy(&two, &b, &c);
        let mut pinned = device.pinned::<u16>(20_000).unwrap();
        c.read_pinned(&two, &mut pinned).unwrap();
        assert_eq!(pinned.read().unwrap(), ramp(20_000, 1));
        assert_eq!(b.download().unwrap(), ramp(20_000, 1));
    }
}

#[test]
fn copies_on_a_stream_can_be_captured() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let [a, b, c] = [0; 3].map(|_| device.zeros::<u16>(5_000).unwrap());
        a.write(&stream, &ramp(5_000, 1)).unwrap();
        b.copy_from(&stream, &a).unwrap();
        stream.begin_capture().unwrap();
        c.copy_from(&stream, &b).unwrap();
        let graph = stream.end_capture().unwrap();
        assert_eq!(c.download().unwrap(), [0; 5_000], "a capture runs nothing");
        graph.launch(&stream).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(c.download().unwrap(), ramp(5_000, 1));

        // A range, itself, and what makes no sense.
        let [half, rest] = [0..4_000, 6_000..10_000].map(|bytes| a.view::<u16>(bytes).unwrap());
        half.copy_from(&stream, &rest).unwrap();
        a.copy_from(&stream, &a).unwrap();
        stream.synchronize().unwrap();
        let want = ramp(5_000, 1);
        assert_eq!(a.download().unwrap(), [&want[3_000..], &want[2_000..]].concat());
        let shifted = a.view::<u16>(2..4_002).unwrap();
        for (error, part) in [
            (half.copy_from(&stream, &shifted).unwrap_err(), "overlaps it"),
            (half.copy_from(&stream, &a).unwrap_err(), "2000 elements cannot be copied from one with 5000"),
        ] {
            assert!(error.to_string().contains(part) && error.exit_code() == 2, "{error}");
        }
    }
}

#[test]
fn a_graph_replays_its_launches_on_what_memory_holds_by_then() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let [a, b, c] = [0; 3].map(|_| device.zeros::<u16>(9_000).unwrap());
        a.write(&stream, &ramp(9_000, 1)).unwrap();
        stream.begin_capture().unwrap();
        copy(&stream, &a, &b);
        copy(&stream, &b, &c);
        let graph = stream.end_capture().unwrap();
        assert_eq!(c.download().unwrap(), [0; 9_000], "a capture runs nothing");
        assert_eq!(graph.operations().unwrap(), 2);
        for seed in [1, 2, 3] {
            a.write(&stream, &ramp(9_000, seed)).unwrap();
            graph.launch(&stream).unwrap();
            stream.synchronize().unwrap();
            assert_eq!(c.download().unwrap(), ramp(9_000, seed));
        }
    }
}
