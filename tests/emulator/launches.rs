//! Launches that do not fit, and launches side by side.

use std::thread;

use trencadis::device::Launch;
use trencadis::device::emulator::{Emulator, EmulatorOptions};

use crate::{Case, Params, line_of, ramp};

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

/// Variants of `planted::Early` in order, from the third on, with what the report must say and where.
const EARLY: [(&str, &str); 7] = [
    ("reads 4 bytes of global memory before dependency_wait", "case Early::read"),
    ("writes 4 bytes of global memory before dependency_wait", "case Early::write"),
    ("copies from 16 bytes of global memory before dependency_wait", "case Early::copy"),
    ("adds to 4 bytes of global memory before dependency_wait", "case Early::atomic"),
    ("reads 4 bytes of global memory before dependency_wait", "float x ="),
    ("reads 4 bytes of global memory before dependency_wait", "float x ="),
    ("ends without dependency_wait", ""),
];

#[test]
fn a_dependent_launch_waits_for_the_one_before() {
    let ordinary = Case::new("planted_dependent", 64, 64).shared(1024).a(&ramp(64));
    let dependent = Case { dependent: true, ..ordinary.clone() };
    for variant in 0..2 {
        assert_eq!(dependent.clone().variant(variant).answer::<f32>(), ramp(64));
    }
    for (variant, (expected, line)) in (2..).zip(EARLY) {
        let fault = dependent.clone().variant(variant).fault(expected);
        let (_, thread) = fault.place.expect("a thread");
        if line.is_empty() {
            assert_eq!((fault.site, thread), (None, 0));
            continue;
        }
        assert!(line_of(&fault).starts_with(line), "{fault}");
        assert!(!fault.what.is_empty() && thread != 63, "thread 63 has waited: {fault}");
    }
    // Where nothing can still run, nothing is early.
    for variant in [2, 6, 7, 8] {
        ordinary.clone().variant(variant).run::<f32>(EmulatorOptions::default()).unwrap();
    }
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
