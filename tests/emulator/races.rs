//! Shared and global memory used without waiting for one another.

use trencadis::device::emulator::EmulatorOptions;

use crate::{Case, everywhere, line_of, ramp};

#[test]
fn a_missing_barrier() {
    let a = ramp(64);
    let case = |kernel| Case::new(kernel, 64, 64).shared(256).a(&a);
    let reversed: Vec<f32> = a.iter().rev().copied().collect();
    assert_eq!(case("planted_reverse").answer::<f32>(), reversed);
    let bad = case("planted_reverse_no_barrier");
    for options in everywhere() {
        let fault = bad.run::<f32>(options).expect_err("a race");
        // What shows first depends on who comes first.
        let seen = ["which nobody wrote", "race: reads", "race: writes"];
        assert!(seen.iter().any(|what| fault.what.contains(what)), "{fault}");
    }
}

#[test]
fn a_missing_warp_sync() {
    let a = ramp(32);
    let case = |kernel| Case::new(kernel, 32, 32).shared(128).a(&a);
    let reversed: Vec<f32> = a.iter().rev().copied().collect();
    assert_eq!(case("planted_reverse_lanes").answer::<f32>(), reversed);
    let bad = case("planted_reverse_lanes_no_sync");
    for options in everywhere() {
        let fault = bad.run::<f32>(options).expect_err("a race");
        let seen = ["which nobody wrote", "with no warp_sync or barrier in between"];
        assert!(seen.iter().any(|what| fault.what.contains(what)), "{fault}");
    }
}

fn copy_reverse(kernel: &'static str) -> Case {
    Case::new(kernel, 64, 256).shared(16 * 64).a(&ramp(256))
}

#[test]
fn copies_that_are_waited_for() {
    let result = copy_reverse("planted_copy_reverse").answer::<f32>();
    let expected: Vec<f32> = ramp(256).chunks(4).rev().flatten().copied().collect();
    assert_eq!(result, expected);
}

#[test]
fn a_missing_wait_for_a_copy() {
    let fault = copy_reverse("planted_copy_no_wait").fault("while an asynchronous copy of thread");
    assert!(line_of(&fault).contains("load_16"), "{fault}");
    copy_reverse("planted_copy_too_few_waited_for").fault("while an asynchronous copy of thread");
}

#[test]
fn a_copy_read_by_another_thread_without_a_barrier() {
    let bad = copy_reverse("planted_copy_no_barrier");
    for options in everywhere() {
        let fault = bad.run::<f32>(options).expect_err("a race");
        let seen = ["while an asynchronous copy", "which nobody wrote", "race: reads", "race: writes"];
        assert!(seen.iter().any(|what| fault.what.contains(what)), "{fault}");
    }
}

#[test]
fn a_copy_whose_source_or_destination_is_overwritten() {
    let fault = copy_reverse("planted_copy_overwritten_source")
        .fault("source of this asynchronous copy was overwritten");
    assert!(line_of(&fault).contains("cp_async_16"), "{fault}");
    let fault =
        copy_reverse("planted_copy_overwritten_destination").fault("while an asynchronous copy of thread 5");
    assert!(line_of(&fault).contains("overwritten_destination"), "{fault}");
}

#[test]
fn a_write_after_a_read_that_only_another_order_shows() {
    let case = |kernel| Case::new(kernel, 64, 32).shared(128);
    let right: Vec<u32> = (0..32).rev().collect();
    assert_eq!(case("planted_write_after_read").answer::<u32>(), right);
    let bad = case("planted_write_after_read_race");
    // Blind, the result is right in the natural order and wrong in another.
    let blind = |seed| EmulatorOptions { seed, races: false, ..EmulatorOptions::default() };
    assert_eq!(bad.run::<u32>(blind(0)), Ok(right.clone()));
    assert!((1..6).any(|seed| bad.run::<u32>(blind(seed)).expect("nothing else is wrong") != right));
    // With an eye on races every order shows it.
    bad.fault("race: ");
    let fault = bad.run::<u32>(EmulatorOptions::default()).expect_err("a race");
    assert!(fault.what.contains("writes byte 0 of shared memory, which thread 63 read"), "{fault}");
    assert!(line_of(&fault).contains("100 + lane"), "{fault}");
}

#[test]
fn a_write_after_a_write() {
    let case = |kernel| Case::new(kernel, 64, 64).shared(128);
    let result = case("planted_write_after_write").answer::<u32>();
    assert!((0..64).all(|thread| result[thread] == 100 + thread as u32 % 32));
    let fault = case("planted_write_after_write_race").fault("race: writes byte");
    // Both places are told.
    assert!(line_of(&fault).contains("100 + lane"), "{fault}");
    assert!(fault.what.contains("which thread 0 wrote (tests/kernels/planted.cu:"), "{fault}");
}

#[test]
fn lanes_that_write_the_same_place() {
    let case = |kernel| Case::new(kernel, 32, 32).shared(4);
    assert_eq!(case("planted_one_for_all").answer::<u32>(), vec![7; 32]);
    case("planted_one_for_all_race").fault("race: writes byte 0");
}

#[test]
fn barriers_that_do_not_order_what_they_seem_to() {
    let case = |kernel| Case::new(kernel, 128, 32).shared(128);
    assert_eq!(case("planted_relay").answer::<u32>(), (0..32).collect::<Vec<u32>>());
    let bad = case("planted_relay_race");
    for options in everywhere() {
        let fault = bad.run::<u32>(options).expect_err("a race");
        let seen = ["which nobody wrote", "race: reads", "race: writes"];
        assert!(seen.iter().any(|what| fault.what.contains(what)), "{fault}");
    }
}

#[test]
fn blocks_that_write_the_same_place() {
    let case = |kernel| Case::new(kernel, 32, 8).blocks(8);
    assert_eq!(case("planted_own_place").answer::<u32>(), (0..8).collect::<Vec<u32>>());
    case("planted_own_place_race").fault("of this launch wrote something else");
}

#[test]
fn blocks_that_read_what_another_wrote() {
    let case = |kernel| {
        let case = Case::new(kernel, 32, 0).blocks(2);
        Case { c: vec![0; 12], ..case }
    };
    assert_eq!(case("planted_read_neighbour").answer::<u32>(), [7, 1, 7]);
    let fault =
        case("planted_read_neighbour_race").run::<u32>(EmulatorOptions::default()).expect_err("a stale read");
    assert!(fault.what.contains("load_coherent is for that"), "{fault}");
}
