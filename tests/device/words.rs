//! Words in device memory that streams write and await.

use trencadis::device::Device;

use crate::support::devices::devices;

#[test]
fn a_stream_awaits_what_another_writes() {
    for device in devices() {
        let words = device.zeros::<i32>(3).unwrap();
        let (from, to) = (device.upload(&[1.0f32; 1000]).unwrap(), device.zeros::<f32>(1000).unwrap());
        let (writer, waiter) = (device.stream().unwrap(), device.stream().unwrap());
        for round in 1..4 {
            let value = round as f32;
            from.write(&writer, &[value; 1000]).unwrap();
            waiter.wait_value32(&words, 1, round).unwrap();
            to.copy_from(&waiter, &from).unwrap();
            waiter.write_value32(&words, 2, -round).unwrap();
            writer.write_value32(&words, 1, round).unwrap();
            waiter.synchronize().unwrap();
            assert_eq!(to.download().unwrap(), [value; 1000]);
            assert_eq!(words.download().unwrap(), [0, round, -round]);
        }
    }
}

/// At least: as far as the difference of two words goes, which wraps around.
#[test]
fn counts_may_wrap_around() {
    for device in devices() {
        let words = device.upload(&[i32::MIN + 5, 7]).unwrap();
        let stream = device.stream().unwrap();
        stream.wait_value32(&words, 0, i32::MAX - 5).unwrap();
        stream.wait_value32(&words, 1, 7).unwrap();
        stream.wait_value32(&words, 1, -100).unwrap();
        stream.synchronize().unwrap();
    }
}

#[test]
fn words_are_of_the_stream_s_device() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let words = device.zeros::<i32>(2).unwrap();
        let told = stream.write_value32(&words, 2, 0).unwrap_err().to_string();
        assert!(told.contains("element 2 of a buffer of 2 words"), "{told}");
        let elsewhere = Device::planned(device.info().clone()).zeros::<i32>(2).unwrap();
        assert!(stream.write_value32(&elsewhere, 0, 0).is_err());
        assert!(stream.wait_value32(&elsewhere, 0, 0).is_err());
    }
}

#[test]
fn copies_within_a_device_are_of_one_length_and_apart() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let all = device.upload(&[1.0f32, 2.0, 3.0, 4.0]).unwrap();
        let half = |first: usize| all.view::<f32>(4 * first..4 * first + 8).unwrap();
        half(0).copy_from(&stream, &half(2)).unwrap();
        assert!(half(0).copy_from(&stream, &half(1)).is_err());
        assert!(half(0).copy_from(&stream, &all).is_err());
        stream.synchronize().unwrap();
        assert_eq!(all.download().unwrap(), [3.0, 4.0, 3.0, 4.0]);
    }
}
