//! A device on which nothing runs.

use trencadis::device::{Device, DeviceInfo, Launch};

const GIB: usize = 1 << 30;

/// Far more than this machine has: neither device memory nor pinned memory is really there.
#[test]
fn memory_is_only_planned() {
    let device = Device::planned(DeviceInfo::h100());
    assert_eq!(device.info(), &DeviceInfo::h100());
    let buffers: Vec<_> = [1, 300, 40 * GIB, 30 * GIB].map(|len| device.zeros::<u8>(len).unwrap()).into();
    assert_eq!(device.allocated_bytes(), 70 * GIB + 301);
    assert_eq!(device.free_bytes().unwrap(), 10 * GIB - 301);
    for (i, buffer) in buffers.iter().enumerate() {
        let (start, end) = (buffer.ptr().address(), buffer.ptr().offset(buffer.len()).address());
        assert!(start > 0 && start.is_multiple_of(256), "{start}");
        let apart = |other: u64| other < start || end <= other;
        assert!(buffers.iter().enumerate().all(|(j, other)| i == j || apart(other.ptr().address())));
    }
    let more = device.alloc::<u8>(20 * GIB).unwrap();
    assert_eq!((device.free_bytes().unwrap(), more.len()), (0, 20 * GIB), "a plan may be too large");
    drop((more, buffers));
    assert_eq!((device.allocated_bytes(), device.free_bytes().unwrap()), (0, 80 * GIB));
    assert_eq!(device.pinned::<u32>(GIB / 4).unwrap().read().unwrap()[GIB / 4 - 1], 0);

    let most = [0; 3].map(|_| device.alloc::<u8>(isize::MAX as usize));
    assert!(most[0].is_ok(), "as much as a buffer can be");
    let error = most.into_iter().find_map(Result::err).unwrap();
    assert!(error.to_string().contains("cannot be planned for"), "{error}");
    let error = device.pinned::<u8>(isize::MAX as usize).err().unwrap();
    assert!(error.to_string().contains("of pinned memory cannot be had"), "{error}");
}

#[test]
fn copies_are_forgotten_and_nothing_runs() {
    let device = Device::planned(DeviceInfo::h100());
    let stream = device.stream().unwrap();
    let buffer = device.upload(&[1u32, 2, 3]).unwrap();
    assert_eq!(buffer.download().unwrap(), [0; 3]);
    buffer.write(&stream, &[4, 5, 6]).unwrap();
    let mut pinned = device.pinned::<u32>(3).unwrap();
    pinned.edit().unwrap().copy_from_slice(&[7, 8, 9]);
    buffer.write_pinned(&stream, &mut pinned).unwrap();
    buffer.read_pinned(&stream, &mut pinned).unwrap();
    assert_eq!(pinned.read().unwrap(), [0; 3]);

    let start = stream.record().unwrap();
    stream.wait(&start).unwrap();
    start.synchronize().unwrap();
    assert_eq!(start.elapsed_ms(&stream.record().unwrap()).unwrap(), 0.0);
    stream.begin_capture().unwrap();
    let error = stream.synchronize().unwrap_err();
    assert!(error.to_string().contains("cannot be captured"), "{error}");
    stream.end_capture().unwrap().launch(&stream).unwrap();
    stream.synchronize().unwrap();
    assert!(stream.end_capture().is_err(), "it has ended");

    // SAFETY: refused.
    let outcome =
        unsafe { device.kernels().launch("some_kernel", Launch::new([1; 3], 32, 0), stream.raw(), &[0u64]) };
    let error = outcome.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernel some_kernel cannot be launched: NVIDIA H100 80GB HBM3 is only planned for, and nothing runs \
         on it"
    );
    assert_eq!(error.exit_code(), 1);
}
