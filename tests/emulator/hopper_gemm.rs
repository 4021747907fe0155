//! A matrix product made as those for Hopper are: warps that copy and warps that multiply, clusters, tensor maps.

use bytemuck::{Pod, Zeroable};
use half::bf16;
use trencadis::device::{Launch, TensorMap, TensorSwizzle};

use crate::hopper::{Machine, Tensor, answer, fault, integers, line_of};

const FILE: &str = "tests/kernels/hopper_gemm.cu";
const SOURCE: &str = include_str!("../kernels/hopper_gemm.cu");

/// `hopper_gemm::Params`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    a: TensorMap,
    b: TensorMap,
    c: TensorMap,
    depth: i32,
    fill: i32,
    more: [u64; 7],
}

fn launch(m: usize, n: usize) -> Launch {
    let blocks = m.div_ceil(128).next_multiple_of(2) as u32;
    let grid = [blocks, n.div_ceil(128) as u32, 1];
    Launch { cluster: 2, ..Launch::new(grid, 384, 1024 + 3 * 32_768 + 65_536) }
}

fn prepare(m: usize, n: usize, k: usize) -> impl Fn(&Machine) -> Params {
    move |machine| {
        let operand = |values: &[bf16], rows: usize, tile: u32| {
            let sizes = [k as u32, rows as u32];
            machine.tensor(&Tensor::bf16(values, &sizes, &[64, tile], TensorSwizzle::Bytes128))
        };
        let c = vec![f32::NAN; m * n];
        Params {
            a: operand(&integers(m * k, 7, 13), m, 128),
            b: operand(&integers(n * k, 5, 11), n, 64),
            c: machine.result_tensor(&Tensor::f32(
                &c,
                &[n as u32, m as u32],
                &[32, 64],
                TensorSwizzle::Bytes128,
            )),
            depth: k as i32,
            fill: 0,
            more: [0; 7],
        }
    }
}

fn reference(m: usize, n: usize, k: usize) -> Vec<f32> {
    let (a, b) = (integers(m * k, 7, 13), integers(n * k, 5, 11));
    let row = |a: &[bf16], b: &[bf16]| a.iter().zip(b).map(|(x, y)| x.to_f64() * y.to_f64()).sum::<f64>();
    a.chunks(k).flat_map(|a| b.chunks(k).map(move |b| row(a, b) as f32)).collect()
}

#[test]
fn a_product_in_a_pipeline_is_exact() {
    for (m, n, k) in [(256, 128, 64), (256, 128, 448), (200, 132, 328)] {
        let result: Vec<f32> = answer("hopper_pipeline", launch(m, n), prepare(m, n, k));
        assert!(result == reference(m, n, k), "{m} x {n} x {k}");
    }
}

#[test]
fn what_a_pipeline_must_not_do() {
    let caught = |bug: &str, expected: &[&str], line: &str| {
        let fault =
            fault(&format!("hopper_pipeline_{bug}"), launch(256, 128), expected, prepare(256, 128, 448));
        if !line.is_empty() {
            let named = line_of(&fault, FILE, SOURCE);
            assert!(named.contains(line), "{fault}\nnames the line: {named}");
        }
    };
    let reused = ["while a wgmma (tests/kernels/hopper_gemm.cu:", "which a wgmma of warps"];
    caught("early_release", &reused, "ptx::tensor_load");
    let ended = ["of its cluster, which has ended", "a barrier of the cluster must come between", "no warp"];
    caught("no_last_barrier", &ended, "ptx::");
    caught("own_bytes", &["bytes are missing", "while an asynchronous copy", "race: "], "");
    caught("no_proxy_fence", &["with no fence_proxy_async in between"], "ptx::tensor_store");
}
