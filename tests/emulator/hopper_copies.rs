//! Bulk copies by the tensor memory accelerator: where elements come to lie, and what goes wrong.

use bytemuck::{Pod, Zeroable};
use half::bf16;
use trencadis::device::emulator::{CopyPolicy, EmulatorOptions};
use trencadis::device::{Device, Launch, TensorBoxes, TensorElement, TensorMap, TensorSwizzle};

use crate::hopper::{Machine, Tensor, answer, fault, line_of, run};
use crate::ramp;

const FILE: &str = "tests/kernels/hopper_copies.cu";
const SOURCE: &str = include_str!("../kernels/hopper_copies.cu");

/// `hopper_copies::Params`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    input: TensorMap,
    output: TensorMap,
    x: u64,
    y: u64,
    at: [i32; 5],
    bytes: i32,
    variant: i32,
    fill: [u32; 5],
}

const SWIZZLES: [TensorSwizzle; 4] =
    [TensorSwizzle::None, TensorSwizzle::Bytes32, TensorSwizzle::Bytes64, TensorSwizzle::Bytes128];

/// Where byte `at` of a box comes to lie, the box beginning at a multiple of 1024.
fn swizzled(at: usize, swizzle: TensorSwizzle) -> usize {
    let row = swizzle.row_bytes().map_or(16, |bytes| bytes as usize);
    at ^ ((at >> 7 & (row / 16 - 1)) << 4)
}

/// The box of `tensor` at `at` as it lies in shared memory, zeros where it is outside.
fn box_of(tensor: &Tensor, at: &[i32]) -> Vec<u8> {
    let element = tensor.element.bytes() as usize;
    let count: usize = tensor.tile.iter().map(|&side| side as usize).product();
    let mut bytes = vec![0; count * element];
    for i in 0..count {
        let (mut rest, mut index, mut stride, mut inside) = (i, 0, 1, true);
        for ((&side, &size), &at) in tensor.tile.iter().zip(&tensor.sizes).zip(at) {
            let place = at as i64 + (rest % side as usize) as i64;
            rest /= side as usize;
            inside &= (0..i64::from(size)).contains(&place);
            index += if inside { place as usize * stride } else { 0 };
            stride *= size as usize;
        }
        if inside {
            let to = swizzled(i * element / 16 * 16, tensor.swizzle) + i * element % 16;
            bytes[to..to + element].copy_from_slice(&tensor.bytes[index * element..][..element]);
        }
    }
    bytes
}

fn check(tensor: &Tensor, at: &[i32]) {
    let expected = box_of(tensor, at);
    let kernel = format!("hopper_load_{}", tensor.sizes.len());
    let launch = Launch::new([1; 3], 64, 1024 + expected.len() as u32);
    let result: Vec<u8> = answer(&kernel, launch, |machine| {
        let mut coordinates = [0; 5];
        coordinates[..at.len()].copy_from_slice(at);
        Params {
            input: machine.tensor(tensor),
            y: machine.result(&vec![0xff; expected.len()]),
            at: coordinates,
            bytes: expected.len() as i32,
            ..Params::zeroed()
        }
    });
    assert!(result == expected, "{:?} at {at:?}", (&tensor.sizes, &tensor.tile, tensor.swizzle));
}

#[test]
fn boxes_lie_as_their_swizzle_says() {
    for swizzle in SWIZZLES {
        let row = swizzle.row_bytes().unwrap_or(48) / 4;
        let tensor = Tensor::f32(&ramp(100 * 40), &[100, 40], &[row, 16], swizzle);
        check(&tensor, &[8, 5]);
    }
}

#[test]
fn what_lies_outside_is_zeros() {
    let values: Vec<bf16> = (0..72 * 20 * 3).map(|i| bf16::from_bits(1 + i as u16)).collect();
    for at in [[-5, -3], [60, 17], [-64, 0], [72, 0], [0, 100]] {
        check(&Tensor::bf16(&values, &[72, 60], &[64, 8], TensorSwizzle::Bytes128), &at);
    }
    let planes = Tensor::bf16(&values, &[72, 20, 3], &[32, 3, 4], TensorSwizzle::Bytes64);
    check(&planes, &[50, 18, -1]);
}

#[test]
fn tensors_of_one_to_five_dimensions() {
    let values = ramp(16 * 3 * 5 * 2 * 2);
    check(&Tensor::f32(&values, &[480], &[64], TensorSwizzle::None), &[30]);
    check(&Tensor::f32(&values, &[16, 3, 5, 4], &[8, 2, 3, 3], TensorSwizzle::Bytes32), &[6, 2, 1, 2]);
    check(
        &Tensor::f32(&values, &[16, 3, 5, 2, 2], &[8, 2, 3, 2, 3], TensorSwizzle::Bytes32),
        &[6, 2, 1, 1, -1],
    );
}

/// Adds 1 to a box of 32 x 8 f32 at (20, 3) of [60, 20] on its way to (40, 15) of [60, 20].
fn increment(machine: &Machine) -> Params {
    let input = Tensor::f32(&ramp(60 * 20), &[60, 20], &[32, 8], TensorSwizzle::Bytes128);
    let output = Tensor::f32(&vec![5.0; 60 * 20], &[60, 20], &[32, 8], TensorSwizzle::Bytes128);
    let address = machine.upload(&input.bytes);
    Params {
        input: machine.map(&input, address),
        output: machine.result_tensor(&output),
        x: address,
        at: [20, 3, 40, 15, 0],
        bytes: 32 * 8 * 4,
        ..Params::zeroed()
    }
}

fn incremented(start: f32) -> Vec<f32> {
    let mut expected = vec![5.0; 60 * 20];
    // What lies outside is left out.
    for row in 0..5 {
        for column in 0..20 {
            let x = ((3 + row) * 60 + 20 + column) as f32 + 0.5;
            expected[(15 + row) * 60 + 40 + column] = start + x + 1.0;
        }
    }
    expected
}

fn launch() -> Launch {
    Launch::new([1; 3], 64, 4096)
}

#[test]
fn a_box_there_and_back() {
    assert!(answer::<_, f32>("hopper_increment", launch(), increment) == incremented(0.0));
    assert!(answer::<_, f32>("hopper_increment_add", launch(), increment) == incremented(5.0));
}

/// What bulk copies read is global memory as well, which the launch before may still write.
#[test]
fn a_dependent_launch_waits_before_it_copies() {
    let launch = Launch { dependent: true, ..launch() };
    let fault = fault("hopper_increment", launch, &["before dependency_wait"], increment);
    assert!(fault.what.starts_with("copies from") && fault.place == Some(([0; 3], 0)), "{fault}");
}

#[test]
fn bf16_is_added_and_rounded() {
    // Two numbers of bf16 lie in each f32 that the kernel adds 1.0 to: the upper one is about 1 more, the lower the
    // same.
    let input = Tensor {
        element: TensorElement::Bf16,
        ..Tensor::f32(&[1.0; 32], &[64, 1], &[64, 1], TensorSwizzle::Bytes128)
    };
    let output = Tensor { bytes: bytemuck::cast_slice(&[3.0_f32; 32]).to_vec(), ..input.clone() };
    let result: Vec<bf16> = answer("hopper_increment_add", launch(), |machine| Params {
        input: machine.tensor(&input),
        output: machine.result_tensor(&output),
        bytes: 128,
        ..Params::zeroed()
    });
    let expected: Vec<bf16> = (0..64).map(|i| bf16::from_f32(if i % 2 == 0 { 0.0 } else { 5.0 })).collect();
    assert_eq!(result, expected);
}

#[test]
fn plain_bytes_through_a_ring() {
    let x = ramp(6 * 64);
    let prepare = |machine: &Machine| Params {
        x: machine.upload(bytemuck::cast_slice(&x)),
        y: machine.result(&vec![0xff; 4 * x.len()]),
        bytes: 256,
        ..Params::zeroed()
    };
    let launch = Launch::new([1; 3], 32, 2048);
    assert_eq!(answer::<_, f32>("hopper_copy_ring", launch, prepare), x);
    let fault = fault("hopper_copy_ring_no_wait", launch, &["while a copy of thread 0 out of it"], prepare);
    assert!(line_of(&fault, FILE, SOURCE).contains("ptx::bulk_load(at"), "{fault}");
}

#[test]
fn blocks_add_to_the_same_place() {
    let launch = Launch::new([7, 1, 1], 64, 1024);
    let result: Vec<f32> = answer("hopper_add_plain", launch, |machine| Params {
        y: machine.result(&[0; 512]),
        bytes: 512,
        ..Params::zeroed()
    });
    assert_eq!(result, vec![7.0; 128]);
}

fn swap_launch() -> Launch {
    Launch { cluster: 2, ..Launch::new([2, 1, 1], 32, 2048) }
}

/// Six pieces of 256 bytes.
fn swapped(machine: &Machine) -> Params {
    Params {
        x: machine.upload(bytemuck::cast_slice(&ramp(6 * 64))),
        y: machine.result(&[0xff; 2 * 6 * 256]),
        bytes: 256,
        ..Params::zeroed()
    }
}

#[test]
fn blocks_of_a_cluster_copy_to_each_other() {
    let both = ramp(6 * 64).repeat(2);
    assert_eq!(answer::<_, f32>("hopper_swap", swap_launch(), swapped), both);
    let no_fence =
        fault("hopper_swap_no_fence", swap_launch(), &["with no fence_proxy_async in between"], swapped);
    assert!(line_of(&no_fence, FILE, SOURCE).contains("ptx::peer_copy("), "{no_fence}");
    let own_bytes =
        fault("hopper_swap_own_bytes", swap_launch(), &["counts the bytes in another block"], swapped);
    assert!(line_of(&own_bytes, FILE, SOURCE).contains("ptx::peer_copy("), "{own_bytes}");
    fault("hopper_swap_early", swap_launch(), &["race: ", "while", "with no wait"], swapped);
    let options = EmulatorOptions { policy: CopyPolicy::AtWait, ..EmulatorOptions::default() };
    let overwritten = run::<_, f32>(options, "hopper_swap_overwritten", swap_launch(), swapped).unwrap_err();
    assert!(
        overwritten.what.contains("the source of this asynchronous copy was overwritten"),
        "{overwritten}"
    );
}

/// What a thread sees of a copy that it does not wait for.
const NOT_THERE: [&str; 3] = [
    "which nobody wrote",
    "while an asynchronous copy of thread 0",
    "with no wait for its mbarrier in between",
];

/// What each bug must be called, and the line that is to be named; none where no thread is at fault.
const BUGS: [(&str, &[&str], &str); 19] = [
    ("too_few_bytes", &["and -16 bytes are missing"], ""),
    ("too_many_bytes", &["and 16 bytes are missing"], ""),
    ("wrong_parity", &NOT_THERE, "values.load(i) + 1.0f"),
    ("no_wait", &NOT_THERE, "values.load(i) + 1.0f"),
    (
        "no_init_barrier",
        &["where no mbarrier was initialised", "with no barrier in between"],
        "ptx::mbarrier_wait",
    ),
    ("no_init_fence", &["has shown to the asynchronous proxy"], "ptx::tensor_load(box, p.in"),
    ("two_arrivals", &["arrives 1 times at the mbarrier", "finds the next over too", "deadlock"], ""),
    ("no_mbarrier", &["where no mbarrier was initialised"], ""),
    ("init_twice", &["initialises the mbarrier at byte 0 a second time"], "Bug::init_twice"),
    ("generic_write", &["writes byte 4 of shared memory, where an mbarrier lies"], "Bug::generic_write"),
    ("destination_written", &NOT_THERE, "Bug::destination_written"),
    ("unfenced_destination", &["with no fence_proxy_async in between"], "ptx::tensor_load(box, p.in"),
    ("no_store_fence", &["with no fence_proxy_async in between"], "ptx::tensor_store(p.out"),
    ("no_store_barrier", &["race: ", "with no fence_proxy_async in between"], ""),
    ("no_store_wait", &["bulk_wait_read first"], "ptx::tensor_store(p.out"),
    ("store_overwritten", &["while a copy of thread 0 out of it"], "Bug::store_overwritten"),
    ("exit_without_wait", &["ends"], ""),
    ("misaligned", &["which is not aligned to 128"], "ptx::tensor_load(box, p.in"),
    ("past_end", &["of which the block has 4096"], "ptx::tensor_load(box, p.in"),
];

#[test]
fn what_copies_must_not_do() {
    for (bug, expected, line) in BUGS {
        let fault = fault(&format!("hopper_increment_{bug}"), launch(), expected, increment);
        if !line.is_empty() {
            let named = line_of(&fault, FILE, SOURCE);
            assert!(named.contains(line), "{bug}: {fault}\nnames the line: {named}");
        }
    }
}

#[test]
fn a_source_that_is_overwritten_while_it_is_copied() {
    // As early as the hardware may, the copy is over by then.
    for seed in 0..6 {
        let options = EmulatorOptions { seed, policy: CopyPolicy::AtWait, ..EmulatorOptions::default() };
        let fault = run::<_, f32>(options, "hopper_increment_source_overwritten", launch(), increment)
            .expect_err("a source that changes");
        assert!(fault.what.contains("the source of this asynchronous copy was overwritten"), "{fault}");
        assert!(line_of(&fault, FILE, SOURCE).contains("ptx::tensor_load(box, p.in"), "{fault}");
    }
}

#[test]
fn a_device_makes_tensor_maps_and_runs_clusters() {
    let device = Device::emulator(EmulatorOptions::default());
    let (stream, values) = (device.stream().unwrap(), ramp(64));
    let input = device.upload(&values).unwrap();
    let output = device.zeros::<f32>(32).unwrap();
    let boxes = TensorBoxes {
        element: TensorElement::F32,
        address: input.ptr().address(),
        sizes: &[16, 4],
        strides: &[64],
        tile: &[8, 4],
        swizzle: TensorSwizzle::None,
    };
    let params = Params {
        input: device.kernels().tensor_map(&boxes).unwrap(),
        y: output.ptr().address(),
        at: [8, 0, 0, 0, 0],
        bytes: 128,
        ..Params::zeroed()
    };
    // Both blocks write the same.
    let launch = Launch { cluster: 2, ..Launch::new([2, 1, 1], 64, 2048) };
    // SAFETY: the parameters are the kernel's, and the buffers live on.
    unsafe { device.kernels().launch("hopper_load_2", launch, stream.raw(), &params).unwrap() };
    let expected: Vec<f32> = values.chunks(16).flat_map(|row| row[8..].to_vec()).collect();
    assert_eq!(output.download().unwrap(), expected);
    let refused = device.kernels().tensor_map(&TensorBoxes { sizes: &[16], ..boxes }).unwrap_err();
    assert!(refused.to_string().contains("1 sizes, 1 strides"), "{refused}");
}
