//! Kernels of the emulator's own tests, many of them wrong on purpose.

use crate::registry::{Kernel, Source, Tier};

/// Name, body, threads of a block.
#[rustfmt::skip]
const PLANTED: [(&str, &str, u32); 42] = [
    ("planted_matmul", "matmul<false>", 32),
    ("planted_matmul_wrong_fragment", "matmul<true>", 32),
    ("planted_mma_forms", "mma_forms<bf16>", 32),
    ("planted_mma_forms_f16", "mma_forms<f16>", 32),
    ("planted_conversions_f16", "conversions_f16", 64),
    ("planted_ldmatrix", "ldmatrix", 32),
    ("planted_exchanges", "exchanges", 64),
    ("planted_copy_zero_fill", "copy_zero_fill", 64),
    ("planted_copy_ring", "copy_ring", 64),
    ("planted_named_barriers", "named_barriers", 128),
    ("planted_last_block", "last_block", 32),
    ("planted_wait_for_next", "wait_for_next", 64),
    ("planted_functions", "functions", 64),
    ("planted_reverse", "reverse<false>", 64),
    ("planted_reverse_no_barrier", "reverse<true>", 64),
    ("planted_reverse_lanes", "reverse_lanes<false>", 32),
    ("planted_reverse_lanes_no_sync", "reverse_lanes<true>", 32),
    ("planted_copy_reverse", "copy_reverse<planted::CopyBug::none>", 64),
    ("planted_copy_no_wait", "copy_reverse<planted::CopyBug::no_wait>", 64),
    ("planted_copy_too_few_waited_for", "copy_reverse<planted::CopyBug::too_few_waited_for>", 64),
    ("planted_copy_no_barrier", "copy_reverse<planted::CopyBug::no_barrier>", 64),
    ("planted_copy_overwritten_source", "copy_reverse<planted::CopyBug::overwritten_source>", 64),
    ("planted_copy_overwritten_destination", "copy_reverse<planted::CopyBug::overwritten_destination>", 64),
    ("planted_write_after_read", "write_after_read<false>", 64),
    ("planted_write_after_read_race", "write_after_read<true>", 64),
    ("planted_write_after_write", "write_after_write<false>", 64),
    ("planted_write_after_write_race", "write_after_write<true>", 64),
    ("planted_one_for_all", "one_for_all<false>", 32),
    ("planted_one_for_all_race", "one_for_all<true>", 32),
    ("planted_relay", "relay<false>", 128),
    ("planted_relay_race", "relay<true>", 128),
    ("planted_access", "access", 32),
    ("planted_meeting", "meeting", 64),
    ("planted_own_place", "own_place<false>", 32),
    ("planted_own_place_race", "own_place<true>", 32),
    ("planted_read_neighbour", "read_neighbour<false>", 32),
    ("planted_read_neighbour_race", "read_neighbour<true>", 32),
    ("planted_dependent", "dependent", 64),
    ("planted_copy_when_ready", "copy_when_ready<false>", 64),
    ("planted_copy_when_ready_no_wait", "copy_when_ready<true>", 64),
    ("planted_count_what_is_written", "count_what_is_written<false>", 64),
    ("planted_count_what_is_written_early", "count_what_is_written<true>", 64),
];

/// The same for `hopper_copies`, `hopper_meetings` and `hopper_gemm`, whose bugs are template arguments.
#[rustfmt::skip]
const HOPPER_COPIES: [(&str, &str, u32); 15] = [
    ("hopper_load_1", "load<1>", 64),
    ("hopper_load_2", "load<2>", 64),
    ("hopper_load_3", "load<3>", 64),
    ("hopper_load_4", "load<4>", 64),
    ("hopper_load_5", "load<5>", 64),
    ("hopper_increment", "increment<>", 64),
    ("hopper_increment_add", "increment<hopper_copies::Bug::none, true>", 64),
    ("hopper_copy_ring", "ring<false>", 32),
    ("hopper_copy_ring_no_wait", "ring<true>", 32),
    ("hopper_add_plain", "add_plain", 64),
    ("hopper_swap", "swap<>", 32),
    ("hopper_swap_no_fence", "swap<hopper_copies::Swap::no_fence>", 32),
    ("hopper_swap_overwritten", "swap<hopper_copies::Swap::overwritten>", 32),
    ("hopper_swap_own_bytes", "swap<hopper_copies::Swap::own_bytes>", 32),
    ("hopper_swap_early", "swap<hopper_copies::Swap::early>", 32),
];

const COPY_BUGS: [&str; 20] = [
    "wrong_parity",
    "too_few_bytes",
    "too_many_bytes",
    "no_wait",
    "no_init_fence",
    "no_init_barrier",
    "two_arrivals",
    "no_mbarrier",
    "init_twice",
    "generic_write",
    "source_overwritten",
    "destination_written",
    "unfenced_destination",
    "no_store_fence",
    "no_store_barrier",
    "no_store_wait",
    "store_overwritten",
    "exit_without_wait",
    "misaligned",
    "past_end",
];

#[rustfmt::skip]
const HOPPER_MEETINGS: [(&str, &str, u32); 23] = [
    ("hopper_ring", "ring<>", 64),
    ("hopper_ring_wrong_parity", "ring<hopper_meetings::Bug::wrong_parity>", 64),
    ("hopper_ring_no_arrival", "ring<hopper_meetings::Bug::no_arrival>", 64),
    ("hopper_ring_no_warp_sync", "ring<hopper_meetings::Bug::no_warp_sync>", 64),
    ("hopper_ring_no_full_wait", "ring<hopper_meetings::Bug::no_full_wait>", 64),
    ("hopper_ring_no_empty_wait", "ring<hopper_meetings::Bug::no_empty_wait>", 64),
    ("hopper_hand_over", "hand_over<false>", 64),
    ("hopper_hand_over_late", "hand_over<true>", 64),
    ("hopper_matrices", "matrices", 32),
    ("hopper_registers", "registers<hopper_meetings::Shift::good>", 384),
    ("hopper_registers_half", "registers<hopper_meetings::Shift::half>", 384),
    ("hopper_registers_too_many", "registers<hopper_meetings::Shift::too_many>", 384),
    ("hopper_registers_no_decrease", "registers<hopper_meetings::Shift::no_decrease>", 384),
    ("hopper_registers_backwards", "registers<hopper_meetings::Shift::backwards>", 384),
    ("hopper_exchange", "exchange<hopper_meetings::Peer::good>", 32),
    ("hopper_exchange_exits", "exchange<hopper_meetings::Peer::exits>", 32),
    ("hopper_exchange_no_barrier", "exchange<hopper_meetings::Peer::no_barrier>", 32),
    ("hopper_exchange_late_arrival", "exchange<hopper_meetings::Peer::late_arrival>", 32),
    ("hopper_exchange_past_end", "exchange<hopper_meetings::Peer::past_end>", 32),
    ("hopper_exchange_no_such_rank", "exchange<hopper_meetings::Peer::no_such_rank>", 32),
    ("hopper_exchange_arrive_twice", "exchange<hopper_meetings::Peer::arrive_twice>", 32),
    ("hopper_share", "share<false>", 32),
    ("hopper_share_race", "share<true>", 32),
];

#[rustfmt::skip]
const HOPPER_GEMM: [(&str, &str, u32); 5] = [
    ("hopper_pipeline", "gemm<>", 384),
    ("hopper_pipeline_early_release", "gemm<hopper_gemm::Bug::early_release>", 384),
    ("hopper_pipeline_no_last_barrier", "gemm<hopper_gemm::Bug::no_last_barrier>", 384),
    ("hopper_pipeline_own_bytes", "gemm<hopper_gemm::Bug::own_bytes>", 384),
    ("hopper_pipeline_no_proxy_fence", "gemm<hopper_gemm::Bug::no_proxy_fence>", 384),
];

/// Bugs of `hopper_wgmma::Bug`.
const WGMMA_BUGS: [&str; 12] = [
    "no_fence",
    "read_before_wait",
    "written_before_wait",
    "overwritten_operand",
    "unnamed",
    "no_wait",
    "wrong_swizzle",
    "misaligned",
    "past_end",
    "half_a_group",
    "generic_operand",
    "other_shape",
];

fn wgmma() -> Vec<Kernel> {
    let make = |name: String, body: &str| kernel("hopper_wgmma", &name, body, 128);
    let good = (8..=256).step_by(8).map(|n| make(format!("hopper_wgmma_{n}"), &format!("product<{n}>")));
    let bad = WGMMA_BUGS
        .iter()
        .map(|bug| make(format!("hopper_wgmma_{bug}"), &format!("product<64, hopper_wgmma::Bug::{bug}>")));
    let patterns = ["none", "bytes_32", "bytes_64", "bytes_128"].iter().flat_map(|pattern| {
        [("k", false), ("mn", true)].map(|(major, transposed)| {
            let body = format!("patterns<Swizzle::{pattern}, {transposed}>");
            make(format!("hopper_wgmma_{pattern}_{major}"), &body)
        })
    });
    let of_f16 = make("hopper_wgmma_f16".into(), "product<64, hopper_wgmma::Bug::none, f16>");
    good.chain(patterns).chain(bad).chain([of_f16]).collect()
}

fn copies() -> Vec<Kernel> {
    let bad = COPY_BUGS.iter().map(|bug| {
        let (name, body) =
            (format!("hopper_increment_{bug}"), format!("increment<hopper_copies::Bug::{bug}>"));
        kernel("hopper_copies", &name, &body, 64)
    });
    listed("hopper_copies", &HOPPER_COPIES).into_iter().chain(bad).collect()
}

fn listed(space: &str, kernels: &[(&str, &str, u32)]) -> Vec<Kernel> {
    kernels.iter().map(|&(name, body, threads)| kernel(space, name, body, threads)).collect()
}

fn kernel(space: &str, name: &str, body: &str, threads: u32) -> Kernel {
    let params = match space {
        "planted" => "planted::Params",
        "hopper_copies" => "hopper_copies::Params",
        "hopper_meetings" => "hopper_meetings::Params",
        "hopper_gemm" => "hopper_gemm::Params",
        _ => "hopper_wgmma::Params",
    };
    let body = format!("{space}::{body}");
    Kernel { name: name.into(), body, params, threads, min_blocks: 1, tensor_cores: false }
}

/// The sources, which stand in `tests/kernels`.
pub fn sources() -> Vec<Source> {
    let source = |file, tier, kernels| Source { file, tier, kernels };
    vec![
        source("../tests/kernels/planted.cu", Tier::Sm80, listed("planted", &PLANTED)),
        source("../tests/kernels/hopper_copies.cu", Tier::Sm90, copies()),
        source(
            "../tests/kernels/hopper_meetings.cu",
            Tier::Sm90,
            listed("hopper_meetings", &HOPPER_MEETINGS),
        ),
        source("../tests/kernels/hopper_wgmma.cu", Tier::Sm90, wgmma()),
        source("../tests/kernels/hopper_gemm.cu", Tier::Sm90, listed("hopper_gemm", &HOPPER_GEMM)),
    ]
}
