//! mbarriers between warps, registers that move between warpgroups, clusters.

use bytemuck::{Pod, Zeroable};
use trencadis::device::Launch;
use trencadis::device::emulator::EmulatorOptions;

use crate::hopper::{Machine, answer, fault, line_of, run};

const FILE: &str = "tests/kernels/hopper_meetings.cu";
const SOURCE: &str = include_str!("../kernels/hopper_meetings.cu");

/// `hopper_meetings::Params`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    y: u64,
    n: i32,
    variant: i32,
}

fn words(n: i32, words: usize) -> impl Fn(&Machine) -> Params {
    move |machine| Params { y: machine.result(&vec![0xff; 4 * words]), n, variant: 0 }
}

fn pair() -> Launch {
    Launch::new([1; 3], 64, 512)
}

#[test]
fn numbers_through_a_ring_of_mbarriers() {
    for n in [1, 2, 7] {
        let result: Vec<u32> = answer("hopper_ring", pair(), words(n, 32));
        let n = n as u32;
        let expected: Vec<u32> = (0..32).map(|lane| 100 * n * (n - 1) / 2 + n * (31 - lane)).collect();
        assert_eq!(result, expected);
    }
}

#[test]
fn a_launch_so_long_that_epochs_run_out() {
    let n = 40_000;
    let result: Vec<u32> = run(EmulatorOptions::default(), "hopper_ring", pair(), words(n, 32))
        .unwrap_or_else(|fault| panic!("{fault}"));
    let sum = (0..n as u32).fold(0_u32, |sum, i| sum.wrapping_add(100 * i));
    let expected: Vec<u32> = (0..32).map(|lane| sum.wrapping_add(n as u32 * (31 - lane))).collect();
    assert_eq!(result, expected);
}

#[test]
fn a_ring_with_a_wait_or_an_arrival_missing() {
    let caught =
        |bug: &str, expected: &[&str]| fault(&format!("hopper_ring_{bug}"), pair(), expected, words(7, 32));
    let unread = ["which nobody wrote", "race: reads", "race: writes"];
    caught("wrong_parity", &["which nobody wrote", "race: reads", "deadlock"]);
    caught("no_full_wait", &unread);
    caught("no_empty_wait", &["race: ", "finds the next over too", "deadlock"]);
    caught("no_warp_sync", &["race: writes"]);
    let fault = caught("no_arrival", &["deadlock: no thread can go on"]);
    let expected =
        "wait at the mbarrier at byte 16 for the end of phase 0, parity 0 (tests/kernels/hopper_meetings.cu:";
    assert!(fault.what.contains(expected), "{fault}");
    assert!(fault.what.contains("1 of 1 arrivals and 0 bytes are missing"), "{fault}");
}

#[test]
fn a_barrier_that_one_warp_passes_by() {
    let expected: Vec<u32> = (0..32).map(|lane| 7 * lane).collect();
    assert_eq!(answer::<_, u32>("hopper_hand_over", pair(), words(0, 32)), expected);
    fault("hopper_hand_over_late", pair(), &["which nobody wrote", "race: "], words(0, 32));
}

#[test]
fn stmatrix_is_the_inverse_of_ldmatrix() {
    let result: Vec<u32> = answer("hopper_matrices", Launch::new([1; 3], 32, 512), words(0, 11 * 32));
    assert!(result[..8 * 32].iter().all(|&difference| difference == 0));
    for lane in 0..32_u32 {
        // Elements (row, column) and (row, column + 1) of matrix 0 transposed: those of lanes with another row.
        let element = |row: u32, column: u32| 2 * (column * 4 + row / 2) + row % 2;
        let (row, column) = (lane / 4, 2 * (lane % 4));
        let expected = element(row, column) | element(row, column + 1) << 16;
        assert_eq!(result[8 * 32 + lane as usize], expected, "lane {lane}");
        assert_eq!(result[9 * 32 + lane as usize], 100 + lane);
        assert_eq!(result[10 * 32 + lane as usize], 100 + lane);
    }
}

#[test]
fn registers_that_warpgroups_give_up_and_take() {
    let launch = Launch::new([1; 3], 384, 0);
    let all = words(0, 384);
    assert_eq!(answer::<_, u32>("hopper_registers", launch, &all), (0..384).collect::<Vec<u32>>());
    let caught = |kernel: &str, expected: &str| fault(kernel, launch, &[expected], &all);
    let half = caught("hopper_registers_half", "waits at set_registers");
    assert!(
        half.what.contains("deadlock") && half.what.contains("for the other warps of its warpgroup"),
        "{half}"
    );
    caught("hopper_registers_too_many", "it wants 248 a thread, and 64 are free");
    caught("hopper_registers_no_decrease", "it wants 240 a thread, and 0 are free");
    let backwards =
        caught("hopper_registers_backwards", "increases the registers of a thread to 160, but has 168");
    assert!(line_of(&backwards, FILE, SOURCE).contains("increase_registers<160>"));
}

fn clusters(grid: u32, cluster: u32) -> Launch {
    Launch { cluster, ..Launch::new([grid, 1, 1], 32, 1024) }
}

#[test]
fn blocks_of_a_cluster_reach_each_other() {
    for cluster in [2, 4, 8] {
        let result: Vec<u32> = answer("hopper_exchange", clusters(8, cluster), words(0, 2 * 8 * 32));
        for block in 0..8 {
            let next = block / cluster * cluster + (block + 1) % cluster;
            for lane in 0..32 {
                let at = (block * 32 + lane) as usize;
                assert_eq!(result[at], 100 * next + lane, "cluster {cluster}, block {block}");
                assert_eq!(result[8 * 32 + at], 1, "cluster {cluster}, block {block}");
            }
        }
    }
}

#[test]
fn what_blocks_of_a_cluster_must_not_do() {
    let caught = |bug: &str, expected: &[&str], line: &str| {
        let fault = fault(&format!("hopper_exchange_{bug}"), clusters(4, 2), expected, words(0, 256));
        let named = line_of(&fault, FILE, SOURCE);
        assert!(named.contains(line), "{fault}\nnames the line: {named}");
    };
    let ended = ["of its cluster, which has ended", "a barrier of the cluster must come between"];
    caught("exits", &ended, "peer_load");
    caught("late_arrival", &ended, "peer");
    caught("no_barrier", &["which nobody wrote", "barrier of the cluster in between"], "");
    caught("past_end", &["of shared memory of block rank"], "ptx::peer_load(there");
    caught("no_such_rank", &["block rank 7 of a cluster of 2"], "no_such_rank");
    caught("arrive_twice", &["arrives at the cluster's barrier twice"], "cluster_barrier");
}

#[test]
fn blocks_of_a_cluster_learn_of_global_memory_at_their_barrier() {
    let result: Vec<u32> = answer("hopper_share", clusters(8, 4), words(0, 16));
    assert_eq!(result[8..], [1000, 1000, 1000, 1000, 1004, 1004, 1004, 1004]);
    // Where the reader comes first, it reads what nobody has written yet.
    let options = || EmulatorOptions { resident_blocks: 8, ..EmulatorOptions::default() };
    let fault =
        run::<_, u32>(options(), "hopper_share_race", clusters(8, 4), words(0, 16)).expect_err("a race");
    assert!(fault.what.contains("race: reads byte 0 of an allocation of global memory"), "{fault}");
}

#[test]
fn clusters_that_do_not_fit_are_refused() {
    for (launch, expected) in [
        (clusters(4, 3), "clusters of 3 blocks are out of range"),
        (clusters(9, 9), "at most 8"),
        (clusters(4, 0), "clusters of 0 blocks"),
    ] {
        let fault = run::<_, u32>(EmulatorOptions::default(), "hopper_exchange", launch, words(0, 256));
        let fault = fault.expect_err("refused");
        assert!(fault.what.contains(expected), "{fault}");
    }
}
