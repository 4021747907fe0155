//! Accesses that are out of bounds, misaligned, or to what nobody wrote.

use trencadis::device::Launch;
use trencadis::device::emulator::{Emulator, EmulatorOptions};

use crate::{Case, Params, line_of, ramp};

/// Variants of `planted::Access` in order, with what the report must say.
const REFUSED: [(&str, &str); 19] = [
    ("shared_read_past_end", "reads 4 bytes at byte 512 of shared memory, of which the block has 512"),
    ("shared_write_past_end", "writes 4 bytes at byte 512 of shared memory, of which the block has 512"),
    ("shared_below_begin", "reads 4 bytes at byte -1024 of shared memory"),
    ("shared_misaligned", "reads 16 bytes at byte 4 of shared memory, which is not aligned to 16"),
    ("shared_unwritten", "reads byte 12 of shared memory, which nobody wrote"),
    ("ldmatrix_past_end", "reads 16 bytes at byte 512 of shared memory, of which the block has 512"),
    ("ldmatrix_misaligned", "reads 16 bytes at byte 8 of shared memory, which is not aligned to 16"),
    ("ldmatrix_unwritten", "reads byte 0 of shared memory, which nobody wrote"),
    ("copy_past_end", "copies to 16 bytes at byte 512 of shared memory, of which the block has 512"),
    ("copy_misaligned", "copies to 16 bytes at byte 8 of shared memory, which is not aligned to 16"),
    ("copy_from_past_end", "copies from 16 bytes at byte 40 of an allocation of 40 bytes"),
    ("copy_from_misaligned", "of global memory, which is not aligned to 16"),
    ("global_read_past_end", "reads 4 bytes at byte 40 of an allocation of 40 bytes"),
    ("global_write_past_end", "writes 4 bytes at byte 40 of an allocation of 40 bytes"),
    ("global_before_begin", "reads 4 bytes at byte -4 of an allocation of 40 bytes"),
    ("global_misaligned", "of global memory, which is not aligned to 16"),
    ("global_pair_misaligned", "of global memory, which is not aligned to 4"),
    ("global_null", "reads 4 bytes through a null pointer"),
    ("atomic_past_end", "adds to 4 bytes at byte 40 of an allocation of 40 bytes"),
];

#[test]
fn every_bad_access_is_refused_where_it_stands() {
    for (variant, (name, expected)) in REFUSED.into_iter().enumerate() {
        let case = Case::new("planted_access", 32, 10).shared(512).a(&ramp(10)).n(10).variant(variant as i32);
        let fault = case.fault(expected);
        assert!(line_of(&fault).contains(&format!("Access::{name}")), "{name}: {fault}");
        let thread = match name {
            "ldmatrix_past_end" => 31,
            "ldmatrix_misaligned" | "ldmatrix_unwritten" => 0,
            _ => 3,
        };
        assert_eq!(fault.place, Some(([0, 0, 0], thread)), "{name}: {fault}");
    }
}

#[test]
fn the_report_reads_as_a_sentence() {
    let case = Case::new("planted_access", 32, 10).shared(512).a(&ramp(10)).n(10).variant(12);
    let fault = case.fault("reads");
    let (_, line) = fault.site.clone().expect("a site");
    assert_eq!(
        fault.to_string(),
        format!(
            "kernel planted_access, block (0, 0, 0), thread 3, tests/kernels/planted.cu:{line}: \
             reads 4 bytes at byte 40 of an allocation of 40 bytes of global memory"
        )
    );
}

#[test]
fn memory_that_was_freed() {
    let emulator = Emulator::new(EmulatorOptions::default());
    let (a, c) = (emulator.alloc(40), emulator.alloc(40));
    emulator.free(a);
    let params = Params { a, b: 0, c, n: 3, variant: 12 };
    // SAFETY: the parameters are the kernel's; the use of what was freed is found out before it happens.
    let result = unsafe {
        emulator.launch("planted_access", Launch::new([1; 3], 32, 512), bytemuck::bytes_of(&params))
    };
    let fault = result.expect_err("use after free");
    assert!(
        fault.what.contains("global memory that was freed, at byte 12 of an allocation of 40"),
        "{fault}"
    );
}

#[test]
fn allocations_are_aligned_and_begin_as_nan() {
    let emulator = Emulator::new(EmulatorOptions::default());
    for bytes in [1, 40, 1000] {
        let address = emulator.alloc(bytes);
        assert_eq!(address % 256, 0);
        // SAFETY: allocated, this long.
        let contents = unsafe { std::slice::from_raw_parts(address as *const u8, bytes) };
        assert!(contents.iter().all(|&byte| byte == 0xff));
    }
}
