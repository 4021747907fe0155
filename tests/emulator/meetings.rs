//! Threads that wait for one another in vain.

use crate::{Case, line_of};

fn meeting(variant: i32) -> Case {
    Case::new("planted_meeting", 64, 64).a(&[0_i32]).variant(variant)
}

#[test]
fn a_divergent_shuffle() {
    let fault = meeting(0).fault("the lanes of a warp diverged: this one is at shuffle_xor, but lane");
    assert!(line_of(&fault).contains("shuffle_xor"), "{fault}");
    assert!(fault.what.contains("waits at shuffle_xor (tests/kernels/planted.cu:"), "{fault}");
}

#[test]
fn a_shuffle_after_half_of_the_lanes_have_ended() {
    for options in crate::everywhere() {
        let fault = meeting(1).run::<u32>(options).expect_err("half a shuffle");
        let seen = ["of its warp has ended", "ends while lane"];
        assert!(seen.iter().any(|what| fault.what.contains(what)), "{fault}");
    }
}

#[test]
fn different_collectives() {
    meeting(2).fault("the lanes of a warp diverged");
}

#[test]
fn a_barrier_that_half_of_the_lanes_skip() {
    for options in crate::everywhere() {
        let fault = meeting(3).run::<u32>(options).expect_err("half a barrier");
        let seen = ["of its warp has ended", "ends while lane"];
        assert!(seen.iter().any(|what| fault.what.contains(what)), "{fault}");
        assert!(line_of(&fault).contains("if (lane < 16) ptx::barrier();"), "{fault}");
    }
}

#[test]
fn a_barrier_in_a_branch_of_one_warp() {
    let fault = meeting(4).fault("deadlock: no thread can go on; block (0, 0, 0); warp 0 waits at barrier 0");
    assert!(fault.what.contains("to which 32 of 64 threads have come; warp 1 has ended"), "{fault}");
    assert_eq!(fault.place, None);
}

#[test]
fn barriers_that_do_not_fit() {
    for options in crate::everywhere() {
        // Where the warp that wants 32 threads comes first, it goes on alone.
        let fault = meeting(5).run::<u32>(options).expect_err("different counts");
        let seen = ["waits at it for", "to which 32 of 64 threads have come; warp 1 has ended"];
        assert!(seen.iter().any(|what| fault.what.contains(what)), "{fault}");
    }
    meeting(6).fault("barrier 1 of 96 threads: must be a multiple of 32, and at most the block's 64");
    meeting(7).fault("named barrier 16 does not exist");
    meeting(8).fault("the lanes of a warp name different barriers");
}

#[test]
fn a_shuffle_from_a_lane_that_does_not_exist() {
    let fault = meeting(9).fault("shuffles by 32: a warp has 32 lanes");
    assert_eq!(fault.place.map(|(_, thread)| thread % 32), Some(31));
}

#[test]
fn a_flag_that_nobody_sets() {
    for variant in [10, 11] {
        let fault = meeting(variant).fault("deadlock: no thread can go on");
        assert!(
            fault.what.contains("look at the same value again and again (tests/kernels/planted.cu:"),
            "{fault}"
        );
    }
}
