//! The emulator itself.
#![cfg(feature = "emulator")]

use half::bf16;
use trencadis::device::emulator::{Emulator, EmulatorOptions};

#[test]
fn matmul() {
    let emulator = Emulator::new(EmulatorOptions::default());
    let n = 64 * 64;
    let (a, b, c) = (emulator.alloc(2 * n), emulator.alloc(2 * n), emulator.alloc(4 * n));
    let fill = |at: u64, f: fn(usize) -> f32| unsafe {
        let s = std::slice::from_raw_parts_mut(at as *mut bf16, n);
        s.iter_mut().enumerate().for_each(|(i, x)| *x = bf16::from_f32(f(i)));
        s.iter().map(|x| x.to_f32()).collect::<Vec<_>>()
    };
    let x = fill(a, |i| (i * 7 % 13) as f32 - 6.0);
    let y = fill(b, |i| (i * 5 % 11) as f32 - 5.0);
    let mut params = Vec::new();
    for p in [a, b, c, 0] {
        params.extend_from_slice(&p.to_ne_bytes());
    }
    for _ in 0..5 {
        let t = std::time::Instant::now();
        unsafe { emulator.launch("planted_matmul", [1; 3], 32, 4 * n as u32, &params) }
            .unwrap_or_else(|e| panic!("{e}"));
        println!("{:?}", t.elapsed());
    }
    let z = unsafe { std::slice::from_raw_parts(c as *const f32, n) };
    for i in 0..64 {
        for j in 0..64 {
            let want: f32 = (0..64).map(|k| x[i * 64 + k] * y[j * 64 + k]).sum();
            assert_eq!(z[i * 64 + j], want, "{i} {j}");
        }
    }
}
