//! Instructions against what the PTX manual says of them.

use half::{bf16, f16};
use trencadis::device::emulator::EmulatorOptions;

use crate::{Case, ramp};

/// Small integers, exact in bf16 and in every sum below.
fn integers(n: usize, step: usize, modulus: usize) -> Vec<bf16> {
    (0..n).map(|i| bf16::from_f32((i * step % modulus) as f32 - (modulus / 2) as f32)).collect()
}

/// `a bᵀ + start` for a [m, k] and b [n, k].
fn reference(a: &[bf16], b: &[bf16], k: usize, start: f32) -> Vec<f32> {
    let row =
        |a: &[bf16], b: &[bf16]| start + a.iter().zip(b).map(|(x, y)| x.to_f32() * y.to_f32()).sum::<f32>();
    a.chunks(k).flat_map(|a| b.chunks(k).map(move |b| row(a, b))).collect()
}

#[test]
fn a_matmul_over_ldmatrix_and_mma_tiles() {
    let (a, b) = (integers(64 * 64, 7, 13), integers(64 * 64, 5, 11));
    let case = Case::new("planted_matmul", 32, 64 * 64).shared(4 * 64 * 64).a(&a).b(&b);
    assert_eq!(case.answer::<f32>(), reference(&a, &b, 64, 0.0));
}

#[test]
fn a_wrong_fragment_gives_a_wrong_matmul() {
    let (a, b) = (integers(64 * 64, 7, 13), integers(64 * 64, 5, 11));
    let case = Case::new("planted_matmul_wrong_fragment", 32, 64 * 64).shared(4 * 64 * 64).a(&a).b(&b);
    let (result, expected) = (case.answer::<f32>(), reference(&a, &b, 64, 0.0));
    let wrong =
        (0..64).filter(|&column| (0..64).any(|row| result[row * 64 + column] != expected[row * 64 + column]));
    // Every other tile of eight columns has its registers exchanged.
    assert_eq!(wrong.collect::<Vec<_>>(), (0..64).filter(|column| column / 8 % 2 == 0).collect::<Vec<_>>());
}

#[test]
fn the_three_forms_of_mma_agree() {
    let (a, b) = (integers(16 * 16, 7, 13), integers(8 * 16, 5, 11));
    let expected = reference(&a, &b, 16, 1.0);
    let result = Case::new("planted_mma_forms", 32, 3 * 16 * 8).a(&a).b(&b).answer::<f32>();
    for form in result.chunks(16 * 8) {
        assert_eq!(form, expected);
    }
    let of_f16 = |x: &[bf16]| x.iter().map(|x| f16::from_f32(x.to_f32())).collect::<Vec<_>>();
    let (a, b) = (of_f16(&a), of_f16(&b));
    let result = Case::new("planted_mma_forms_f16", 32, 3 * 16 * 8).a(&a).b(&b).answer::<f32>();
    for form in result.chunks(16 * 8) {
        assert_eq!(form, expected);
    }
}

/// Every f16, what lies halfway to the next one, and beside both; what is too small, too large or no number.
#[test]
fn conversions_of_f16_round_to_nearest_even() {
    let mut a =
        vec![0.0, f32::MIN_POSITIVE, 1e-40, 2f32.powi(-25), 65519.996, 65520.0, f32::MAX, f32::INFINITY];
    a.extend([f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)]);
    for bits in 0..f16::INFINITY.to_bits() {
        let (x, next) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
        let middle = if next.is_finite() { (x + next) / 2.0 } else { 65520.0 };
        a.extend([x.next_up(), middle.next_down(), middle, middle.next_up(), x]);
    }
    let case = Case::new("planted_conversions_f16", 64, 2 * a.len()).a(&a).n(a.len() as i32);
    let result = case.run::<u32>(EmulatorOptions::default()).unwrap_or_else(|fault| panic!("{fault}"));
    for (&x, result) in a.iter().zip(result.chunks(2)) {
        let (lower, upper) = (f16::from_bits(result[0] as u16), f16::from_bits((result[0] >> 16) as u16));
        if x.is_nan() {
            // As the hardware has it.
            assert_eq!((result[0], f32::from_bits(result[1]).is_nan()), (0x7fff_7fff, true));
            continue;
        }
        assert_eq!(lower.to_bits(), f16::from_f32(x).to_bits(), "{x:e}");
        assert_eq!(upper.to_bits(), f16::from_f32(-x).to_bits(), "-{x:e}");
        assert_eq!(result[1], lower.to_f32().to_bits(), "{x:e} and back");
    }
}

#[test]
fn ldmatrix_in_its_four_forms() {
    let result = Case::new("planted_ldmatrix", 32, 4 * 4 * 32).shared(512).answer::<u32>();
    // Element (row, column) of matrix j counts up along rows.
    let element = |j: usize, row: usize, column: usize| (j * 64 + row * 8 + column) as u32;
    for (form, matrices, transposed) in [(0, 4, false), (1, 4, true), (2, 2, false), (3, 2, true)] {
        for j in 0..matrices {
            for lane in 0..32 {
                let (outer, inner) = (lane / 4, 2 * (lane % 4));
                let pair = if transposed {
                    [element(j, inner, outer), element(j, inner + 1, outer)]
                } else {
                    [element(j, outer, inner), element(j, outer, inner + 1)]
                };
                let register = result[(form * 4 + j) * 32 + lane];
                assert_eq!(register, pair[0] | pair[1] << 16, "form {form}, matrix {j}, lane {lane}");
            }
        }
    }
}

#[test]
fn exchanges_of_a_warp() {
    let result = Case::new("planted_exchanges", 64, 8 * 64).answer::<u32>();
    let multiples_of_3 = (0..32).step_by(3).map(|lane| 1_u32 << lane).sum::<u32>();
    for thread in 0..64 {
        let (lane, warp) = (thread % 32, thread / 32 * 32);
        let expected = [
            warp + (lane ^ 5),
            warp + (lane + 3) % 32,
            if lane < 2 { thread } else { thread - 2 },
            multiples_of_3,
            thread / 32,
            ((thread ^ 1) as f32).to_bits(),
            ((warp + 7) as f32).to_bits(),
            lane,
        ];
        for (i, expected) in expected.into_iter().enumerate() {
            assert_eq!(result[i * 64 + thread as usize], expected, "exchange {i}, thread {thread}");
        }
    }
}

#[test]
fn copies_fill_with_zeros_and_do_not_read_what_is_not_valid() {
    // The array ends where the copies stop being valid.
    let a = ramp(4 * 37);
    let result = Case::new("planted_copy_zero_fill", 64, 4 * 64).shared(16 * 64).a(&a).n(37).answer::<f32>();
    assert_eq!(result[..4 * 37], a);
    assert!(result[4 * 37..].iter().all(|&x| x.to_bits() == 0));
}

#[test]
fn groups_of_copies_are_waited_for_in_order() {
    let a = ramp(4 * 4 * 64);
    let result = Case::new("planted_copy_ring", 64, a.len()).shared(3 * 16 * 64).a(&a).answer::<f32>();
    assert_eq!(result, a);
}

#[test]
fn named_barriers_hold_up_their_own_warps_alone() {
    let result = Case::new("planted_named_barriers", 128, 128).shared(4 * 128).answer::<u32>();
    let expected: Vec<u32> = (0..128).map(|thread| 3 * (thread ^ 32) + 3000).collect();
    assert_eq!(result, expected);
}

#[test]
fn the_last_block_sees_what_the_others_wrote() {
    let a: Vec<i32> = (0..23).map(|i| i * i).collect();
    let case = Case::new("planted_last_block", 32, 24).blocks(23).a(&a).b(&[0_i32]);
    let result = case.answer::<i32>();
    assert_eq!(result[..23], a);
    assert_eq!(result[23], a.iter().sum::<i32>());
}

#[test]
fn blocks_that_wait_for_one_another_must_be_resident() {
    let mut case = Case::new("planted_wait_for_next", 64, 0).blocks(6);
    case.c = vec![0; 4 * 6];
    let resident = |resident_blocks| EmulatorOptions { resident_blocks, ..EmulatorOptions::default() };
    assert_eq!(case.run::<i32>(resident(6)), Ok(vec![1; 6]));
    let fault = case.run::<i32>(resident(4)).expect_err("block 3 waits for block 4, which never starts");
    assert!(fault.what.contains("deadlock"), "{fault}");
    assert!(fault.what.contains("2 blocks wait for one of the resident ones to end"), "{fault}");
}

#[test]
fn approximate_functions_are_exact_to_rounding() {
    let a = [0.5_f32, -3.25, 0.0, f32::NEG_INFINITY, 7.0, 1e-40, -140.0, 2.0];
    let n = a.len();
    let result =
        Case::new("planted_functions", 64, 4 * n).a(&a).n(n as i32).run::<f32>(EmulatorOptions::default());
    let result = result.unwrap_or_else(|fault| panic!("{fault}"));
    // Subnormal arguments and results count as zero.
    let flush = |x: f32| if x.is_subnormal() { 0.0 } else { x };
    for (i, &x) in a.iter().enumerate() {
        let wide = f64::from(flush(x));
        let expected = [
            flush(wide.exp2() as f32),
            wide.log2() as f32,
            (1.0 / wide.sqrt()) as f32,
            flush((1.0 / wide) as f32),
        ];
        for (function, expected) in expected.into_iter().enumerate() {
            let got = result[function * n + i];
            assert!(
                got == expected || got.is_nan() && expected.is_nan(),
                "function {function} of {x}: {got}"
            );
        }
    }
}
