//! What the benches and `trencadis profile` hold kernels against.

use half::bf16;
use trencadis::kernels::measure::{MMA_VALUES, fill, rates};

mod support;

use support::devices::devices;

fn ramp(len: usize) -> Vec<bf16> {
    (0..len).map(|i| bf16::from_f32((i % 251) as f32 - 125.0)).collect()
}

#[test]
fn a_device_has_rates() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let before = device.allocated_bytes();
        let rates = rates(&stream, &ramp(MMA_VALUES)).unwrap();
        assert!([rates.operations, rates.bytes, rates.launch].iter().all(|rate| *rate > 0.0), "{rates:?}");
        assert_eq!(device.allocated_bytes(), before, "nothing is left behind");
    }
}

#[test]
fn a_buffer_is_filled_over_and_over() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let values = ramp(24);
        for len in [0, 8, 24, 32, 1000] {
            let buffer = device.zeros(len).unwrap();
            fill(&stream, &buffer, &values).unwrap();
            let want: Vec<bf16> = values.iter().copied().cycle().take(len).collect();
            assert_eq!(buffer.download().unwrap(), want, "{len} elements");
        }
    }
}

#[test]
fn what_cannot_be_measured_with_is_told() {
    for device in devices() {
        let stream = device.stream().unwrap();
        let error = rates(&stream, &ramp(16)).unwrap_err();
        assert!(error.to_string().contains("16 random values to measure with, expected at least"), "{error}");
        let (even, odd) = (device.zeros::<bf16>(16).unwrap(), device.zeros::<bf16>(12).unwrap());
        for (buffer, values) in [(&even, ramp(0)), (&even, ramp(12)), (&odd, ramp(8))] {
            let error = fill(&stream, buffer, &values).unwrap_err();
            assert!(error.to_string().contains("expected multiples of 8 of 2 bytes"), "{error}");
        }
        let wide = device.zeros::<f32>(16).unwrap();
        assert!(fill(&stream, &wide, &[0.0; 8]).unwrap_err().to_string().contains("of 4 bytes"));
    }
}
