//! What holds on every device: the emulator, and a GPU where there is one.

use trencadis::device::Device;

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
    assert_eq!(other.download().unwrap(), [7; 3]);
    drop(other);
    let graph = stream.end_capture().unwrap();
    graph.launch(&stream).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(buffer.download().unwrap(), [0; 4]);
}

#[test]
fn a_launch_is_checked_before_it_runs() {
    use trencadis::device::Launch;
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
