//! Matrix instructions of a warpgroup against a plain product, and what goes wrong with them.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use trencadis::device::{Launch, TensorMap, TensorSwizzle};

use crate::hopper::{Machine, Tensor, answer, fault, integers, line_of, run};

const SOURCE: &str = include_str!("../kernels/hopper_wgmma.cu");

/// `hopper_wgmma::Params`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    a: TensorMap,
    b: TensorMap,
    c: u64,
    variant: i32,
    depth: i32,
    fill: [u64; 6],
}

const A_TRANSPOSED: i32 = 1;
const B_TRANSPOSED: i32 = 2;
const FRAGMENTS: i32 = 4;
/// Operands of f16, for the kernel that takes them.
const F16: i32 = 8;

fn launch(n: usize) -> Launch {
    Launch::new([1; 3], 128, 1024 + 8192 * (1 + n.div_ceil(64) as u32))
}

/// The transpose of a [rows, columns] matrix.
fn transpose(x: &[bf16], columns: usize) -> Vec<bf16> {
    let rows = x.len() / columns;
    (0..columns).flat_map(|c| (0..rows).map(move |r| x[r * columns + c])).collect()
}

/// a [64, depth], b [n, depth].
fn operands(n: usize, depth: usize) -> (Vec<bf16>, Vec<bf16>) {
    (integers(64 * depth, 7, 13), integers(n * depth, 5, 11))
}

fn prepare(machine: &Machine, n: usize, depth: usize, variant: i32) -> Params {
    prepare_boxes(machine, n, depth, variant, 64, TensorSwizzle::Bytes128)
}

/// The same in boxes of 64 rows of `width` elements.
fn prepare_boxes(
    machine: &Machine,
    n: usize,
    depth: usize,
    variant: i32,
    width: u32,
    swizzle: TensorSwizzle,
) -> Params {
    let (a, b) = operands(n, depth);
    let tensor = |x: &[bf16], rows: usize, transposed: bool| {
        // Rows of a transposed matrix end at a multiple of 16 bytes here: n is a multiple of 8.
        let (values, sizes) = if transposed {
            (transpose(x, depth), [rows as u32, depth as u32])
        } else {
            (x.to_vec(), [depth as u32, rows as u32])
        };
        let f16 = |x: &bf16| bf16::from_bits(f16::from_f32(x.to_f32()).to_bits());
        let values = if variant & F16 != 0 { values.iter().map(f16).collect() } else { values };
        machine.tensor(&Tensor::bf16(&values, &sizes, &[width, 64], swizzle))
    };
    Params {
        a: tensor(&a, 64, variant & A_TRANSPOSED != 0),
        b: tensor(&b, n, variant & B_TRANSPOSED != 0),
        c: machine.result(&vec![0xff; 4 * 64 * n]),
        variant,
        depth: depth as i32,
        fill: [0; 6],
    }
}

fn reference(n: usize, depth: usize) -> Vec<f32> {
    let (a, b) = operands(n, depth);
    let row =
        |a: &[bf16], b: &[bf16]| a.iter().zip(b).map(|(x, y)| x.to_f64() * y.to_f64()).sum::<f64>() as f32;
    a.chunks(depth).flat_map(|a| b.chunks(depth).map(move |b| row(a, b))).collect()
}

#[test]
fn every_n_in_both_majors_and_from_registers() {
    for n in (8..=256).step_by(8) {
        let kernel = format!("hopper_wgmma_{n}");
        let expected = reference(n, 64);
        for variant in
            [0, A_TRANSPOSED, B_TRANSPOSED, A_TRANSPOSED | B_TRANSPOSED, FRAGMENTS, FRAGMENTS | B_TRANSPOSED]
        {
            let options = trencadis::device::emulator::EmulatorOptions::default();
            let result: Vec<f32> =
                run(options, &kernel, launch(n), |machine| prepare(machine, n, 64, variant))
                    .unwrap_or_else(|fault| panic!("{fault}"));
            assert!(result == expected, "N {n}, variant {variant}");
        }
    }
}

#[test]
fn operands_of_f16() {
    for variant in [0, A_TRANSPOSED | B_TRANSPOSED, FRAGMENTS] {
        let result: Vec<f32> =
            answer("hopper_wgmma_f16", launch(64), |machine| prepare(machine, 64, 128, variant | F16));
        assert!(result == reference(64, 128), "variant {variant}");
    }
}

#[test]
fn matrices_that_lie_in_every_pattern() {
    for (pattern, width, swizzle) in [
        ("none", 8, TensorSwizzle::None),
        ("bytes_32", 16, TensorSwizzle::Bytes32),
        ("bytes_64", 32, TensorSwizzle::Bytes64),
        ("bytes_128", 64, TensorSwizzle::Bytes128),
    ] {
        for (major, variant) in [("k", 0), ("mn", A_TRANSPOSED | B_TRANSPOSED)] {
            let kernel = format!("hopper_wgmma_{pattern}_{major}");
            let result: Vec<f32> = answer(&kernel, launch(64), |machine| {
                prepare_boxes(machine, 64, 64, variant, width, swizzle)
            });
            assert!(result == reference(64, 64), "{kernel}");
        }
    }
}

#[test]
fn products_over_several_stages_under_every_policy() {
    for (n, variant) in [(8, 0), (64, A_TRANSPOSED), (96, B_TRANSPOSED), (136, FRAGMENTS), (256, 0)] {
        let kernel = format!("hopper_wgmma_{n}");
        let result: Vec<f32> = answer(&kernel, launch(n), |machine| prepare(machine, n, 192, variant));
        assert!(result == reference(n, 192), "N {n}, variant {variant}");
    }
}

/// The report that `bug` gives whatever the order, at a line that says `line`.
fn caught(bug: &str, expected: &str, line: &str) {
    let kernel = format!("hopper_wgmma_{bug}");
    let fault = fault(&kernel, launch(64), &[expected], |machine| prepare(machine, 64, 64, 0));
    let named = line_of(&fault, "tests/kernels/hopper_wgmma.cu", SOURCE);
    assert!(named.contains(line), "{fault}\nnames the line: {named}");
}

#[test]
fn what_a_warpgroup_must_not_do() {
    caught("no_fence", "with no wgmma_fence in between", "ptx::wgmma<E, N, A_TRANSPOSED, B_TRANSPOSED>");
    caught(
        "written_before_wait",
        "the accumulator of this wgmma was written before it was waited for",
        "ptx::wgmma<E, N",
    );
    caught(
        "overwritten_operand",
        "while a wgmma (tests/kernels/hopper_wgmma.cu:",
        "Bug::overwritten_operand",
    );
    caught("unnamed", "without naming its accumulator", "ptx::wgmma_wait<0>();");
    caught("no_wait", "ends while this wgmma is under way", "ptx::wgmma<E, N");
    caught("misaligned", "must begin where the pattern does, a multiple of 1024", "ptx::wgmma<E, N");
    caught("past_end", "wgmma reads 16 bytes at byte", "ptx::wgmma<E, N");
    caught("generic_operand", "by the asynchronous proxy, which thread 0 wrote", "ptx::wgmma<E, N");
    caught("other_shape", "a wgmma of another shape", "ptx::wgmma<E, N / 2>");
}

#[test]
fn half_a_warpgroup() {
    let fault =
        fault("hopper_wgmma_half_a_group", launch(64), &["deadlock: no thread can go on"], |machine| {
            prepare(machine, 64, 64, 0)
        });
    assert!(fault.what.contains("waits at wgmma_fence (tests/kernels/hopper_wgmma.cu:"), "{fault}");
    assert!(fault.what.contains("for the other warps of its warpgroup"), "{fault}");
}

#[test]
fn an_accumulator_read_too_early_holds_nan_or_depends_on_the_policy() {
    let launch = launch(64);
    let results: Vec<Vec<f32>> = crate::everywhere()
        .map(|options| {
            run(options, "hopper_wgmma_read_before_wait", launch, |machine| prepare(machine, 64, 64, 0))
                .unwrap_or_else(|fault| panic!("{fault}"))
        })
        .collect();
    let expected = reference(64, 64);
    assert!(results.contains(&expected), "as early as the hardware may");
    assert!(results.iter().any(|result| result.iter().all(|x| x.is_nan())), "as late as it may");
}

#[test]
fn a_descriptor_that_swizzles_otherwise_than_the_copy() {
    let options = trencadis::device::emulator::EmulatorOptions::default();
    let result: Vec<f32> =
        run(options, "hopper_wgmma_wrong_swizzle", launch(64), |machine| prepare(machine, 64, 64, 0))
            .unwrap_or_else(|fault| panic!("{fault}"));
    assert!(result != reference(64, 64));
}
