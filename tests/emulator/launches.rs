//! Launches that do not fit, and launches side by side.

use std::thread;

use trencadis::device::Launch;
use trencadis::device::emulator::{Emulator, EmulatorOptions};

use crate::{Case, Params, ramp};

#[test]
fn launches_that_do_not_fit_are_refused() {
    let case = Case::new("planted_reverse", 64, 64).shared(256).a(&ramp(64));
    let refusals = [
        (Case { kernel: "planted_nothing", ..case.clone() }, "there is no such kernel"),
        (Case { threads: 32, ..case.clone() }, "launched with 32 threads a block, but made for 64"),
        (case.clone().shared(227 * 1024 + 1), "but the device has 232448"),
        (case.clone().blocks(0), "the grid (0, 1, 1) is out of range"),
    ];
    for (case, expected) in refusals {
        let fault = case.run::<f32>(EmulatorOptions::default()).expect_err("refused");
        assert!(fault.to_string().starts_with(&format!("kernel {}: ", case.kernel)), "{fault}");
        assert!(fault.what.contains(expected), "{fault}");
    }
    let emulator = Emulator::new(EmulatorOptions::default());
    let params = Params::default();
    let short = &bytemuck::bytes_of(&params)[..16];
    // SAFETY: refused for the size of its parameters.
    let fault = unsafe { emulator.launch("planted_reverse", Launch::new([1; 3], 64, 256), short) }
        .expect_err("refused");
    assert!(fault.what.contains("its parameters are 16 bytes here and 32 bytes in the kernel"), "{fault}");
}

#[test]
fn launches_run_side_by_side_and_after_faults() {
    let good = Case::new("planted_reverse", 64, 64).shared(256).a(&ramp(64));
    let bad = Case::new("planted_reverse_no_barrier", 64, 64).shared(256).a(&ramp(64));
    let expected: Vec<f32> = ramp(64).into_iter().rev().collect();
    thread::scope(|scope| {
        for seed in 0..4 {
            let (good, bad, expected) = (&good, &bad, &expected);
            scope.spawn(move || {
                for round in 0..20 {
                    let options =
                        || EmulatorOptions { seed: seed * 100 + round, ..EmulatorOptions::default() };
                    assert!(bad.run::<f32>(options()).is_err());
                    assert_eq!(good.run::<f32>(options()).as_ref(), Ok(expected));
                }
            });
        }
    });
}
