//! Matrix instructions of a warpgroup against a plain product, and what goes wrong with them.

use bytemuck::{Pod, Zeroable};
use half::bf16;
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
    let (a, b) = operands(n, depth);
    let tensor = |x: &[bf16], rows: usize, transposed: bool| {
        // Rows of a transposed matrix end at a multiple of 16 bytes here: n is a multiple of 8.
        let (values, sizes) = if transposed {
            (transpose(x, depth), [rows as u32, depth as u32])
        } else {
            (x.to_vec(), [depth as u32, rows as u32])
        };
        machine.tensor(&Tensor::bf16(&values, &sizes, &[64, 64], TensorSwizzle::Bytes128))
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
    let row = |a: &[bf16], b: &[bf16]| a.iter().zip(b).map(|(x, y)| x.to_f64() * y.to_f64()).sum::<f64>() as f32;
    a.chunks(depth).flat_map(|a| b.chunks(depth).map(move |b| row(a, b))).collect()
}

#[test]
fn every_n_in_both_majors_and_from_registers() {
    for n in (8..=256).step_by(8) {
        let kernel = format!("hopper_wgmma_{n}");
        let expected = reference(n, 64);
        for variant in [0, A_TRANSPOSED, B_TRANSPOSED, A_TRANSPOSED | B_TRANSPOSED, FRAGMENTS, FRAGMENTS | B_TRANSPOSED] {
            let options = trencadis::device::emulator::EmulatorOptions::default();
            let result: Vec<f32> =
                run(options, &kernel, launch(n), |machine| prepare(machine, n, 64, variant)).unwrap_or_else(|fault| panic!("{fault}"));
            assert!(result == expected, "N {n}, variant {variant}");
        }
    }
}
