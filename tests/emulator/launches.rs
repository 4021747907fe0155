//! Launches that do not fit, launches side by side, and what a launch costs.

use std::thread;
use std::time::Instant;

use half::bf16;
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
    let fault = unsafe { emulator.launch("planted_reverse", [1; 3], 64, 256, short) }.expect_err("refused");
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

/// Prints what the parts of a kernel cost: `cargo test --features emulator --test emulator cost -- --nocapture`.
#[test]
fn cost() {
    let time_with = |case: &Case, options: EmulatorOptions| {
        let run = || case.run::<u32>(options.clone()).unwrap_or_else(|fault| panic!("{fault}"));
        let once = || {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64() * 1e6
        };
        // Other work on the machine only ever adds.
        (0..5).map(|_| once()).fold(f64::INFINITY, f64::min)
    };
    let time = |case: &Case| time_with(case, EmulatorOptions::default());
    for (kernel, shared, what) in [
        ("planted_meetings", 0, "a meeting of a warp"),
        ("planted_products", 0, "mma_tiles<2, 8>"),
        ("planted_fragments", 512, "ldmatrix_x4"),
    ] {
        let case = |n| Case::new(kernel, 32, 1).shared(shared).n(n);
        let each = (time(&case(5000)) - time(&case(0))) / 5000.0;
        println!("{what}: {each:.2} us");
    }
    let operand = vec![bf16::ONE; 64 * 64];
    let matmul =
        Case::new("planted_matmul", 32, 64 * 64).shared(4 * 64 * 64).a(&operand).b(&operand).blocks(64);
    for races in [true, false] {
        let options = EmulatorOptions { races, global_races: races, ..EmulatorOptions::default() };
        let each = time_with(&matmul, options) / 64.0;
        println!(
            "a matmul of 64 x 64 x 64, races {}: {each:.1} us",
            if races { "looked for" } else { "ignored" }
        );
    }
}
