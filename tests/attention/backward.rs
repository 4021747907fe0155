//! The backward kernels against the CPU device in f64, on inputs rounded to bf16 and after the forward kernels.

use half::bf16;

use trencadis::cpu::attention::AttentionConfig;
use trencadis::device::DeviceInfo;
use trencadis::kernels::Rows;
use trencadis::kernels::attention::instances::INSTANCES;
use trencadis::kernels::attention::{Attention, Backward, BackwardPlan, Schedule};
use trencadis::recipe::{QkNormKind, Rope};

use crate::case::{Answer, Case, config, rotations};
use crate::gradients::{LONG, SHORT, Way, check, dout, forward, plan, run};
use crate::support::devices::devices;

const KINDS: [QkNormKind; 4] =
    [QkNormKind::None, QkNormKind::Rms, QkNormKind::LayerNorm, QkNormKind::LayerNormBias];
/// Widths of the kernels and head dims between them, by both schedules.
#[test]
fn every_head_dim() {
    for device in devices() {
        for (i, dim) in INSTANCES.iter().map(|instance| instance.width).chain([8, 40, 120]).enumerate() {
            let case = Case::new(config(KINDS[i % 4], 2, dim), &[16, 0, 65, 7, 1], 3);
            check(&case, &device, &[SHORT, LONG]);
        }
    }
}

/// Gradients of rotated rows, of heads that share keys and values, and of both, by both schedules.
#[test]
fn rotations_and_groups() {
    for device in devices() {
        for (i, config) in rotations().enumerate() {
            let case = Case::new(config, &[16, 0, 65, 7, 1], 3);
            check(&case, &device, &[Way { accumulate: i % 4 == 0, ..SHORT }, LONG]);
        }
    }
}

/// The halves of a narrow head lie in one lane or in two.
#[test]
fn halves_of_every_narrow_head() {
    for device in devices() {
        for dim in (8..=64).step_by(8) {
            let config = AttentionConfig { rope: Rope::Halves, ..config(QkNormKind::Rms, 1, dim) };
            check(&Case::new(config, &[37], 0), &device, &[SHORT]);
        }
    }
}

/// Heads that share keys and values have the gradients of heads that have the same ones each for itself, and dk and dv are
/// their sums.
#[test]
fn groups_are_sums() {
    let shared = AttentionConfig { kv_heads: 2, rope: Rope::Halves, ..config(QkNormKind::Rms, 6, 72) };
    let shared = Case::new(shared, &[20, 150, 0, 33], 2);
    let alone = shared.ungrouped();
    for device in devices() {
        let (answer, dout) = (forward(&shared, &device), dout(&shared));
        for way in [SHORT, LONG] {
            let together = run(&shared, &device, way, &answer, &dout);
            let each = run(&alone, &device, way, &answer, &dout);
            assert!(together.rows[0] == each.rows[0], "dq");
            for (sums, parts) in together.rows[1..].iter().zip(&each.rows[1..]) {
                for (sums, parts) in sums.chunks(72).zip(parts.chunks(3 * 72)) {
                    for (i, sum) in sums.iter().enumerate() {
                        let parts = [0, 1, 2].map(|head| parts[72 * head + i].to_f32());
                        assert_eq!(
                            sum.to_bits(),
                            bf16::from_f32(parts.into_iter().fold(0.0, |a, b| a + b)).to_bits()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn norms_and_gains() {
    let way = Way { accumulate: true, ..SHORT };
    for device in devices() {
        for kind in KINDS {
            for per_head in [false, true] {
                let mut config = config(kind, 3, 72);
                config.gain_per_head = per_head;
                config.scale = 0.2;
                config.eps = 1e-2;
                let mut case = Case::new(config, &[33, 5], 2);
                check(&case, &device, &[way]);
                for missing in [[0, 1], [2, 3]] {
                    for i in missing {
                        case.affine[i] = None;
                    }
                    check(&case, &device, &[if missing[0] == 0 { way } else { LONG }]);
                }
            }
        }
    }
}

/// Every way a length can meet warps, steps and schedules, in one batch that fills its budget.
#[test]
fn ragged_batch() {
    for device in devices() {
        let case = Case::new(config(QkNormKind::Rms, 1, 64), &[64, 577, 0, 1, 257, 16, 196, 130, 0], 0);
        check(&case, &device, &[SHORT]);
        let case = Case::new(config(QkNormKind::LayerNorm, 1, 88), &[7, 65, 256, 0, 129], 0);
        check(&case, &device, &[SHORT, Way { short: Some(64), ..SHORT }]);
    }
}

/// Lengths around the steps, stages and key blocks of all kernels.
#[test]
fn around_stages_and_key_blocks() {
    let lengths = [15, 17, 48, 49, 63, 65, 127, 128, 129, 191, 192, 193, 255, 256];
    for device in devices() {
        check(&Case::new(config(QkNormKind::Rms, 1, 64), &lengths, 1), &device, &[SHORT]);
    }
}

/// Images of two key blocks, which stay in shared memory where it is large enough.
#[test]
fn two_key_blocks_of_every_width() {
    for device in devices() {
        for (i, instance) in INSTANCES.iter().enumerate() {
            let case = Case::new(config(KINDS[(i + 1) % 4], 1, instance.width), &[140], 0);
            check(&case, &device, &[SHORT]);
        }
    }
}

/// Key blocks of a long image add to dq by turns: all at once, or a few after the others.
#[test]
fn key_blocks_take_turns() {
    for device in devices() {
        for (heads, dim, lengths, blocks) in
            [(1, 64, &[400, 70][..], &[1, 3, 7][..]), (2, 72, &[321], &[2]), (1, 128, &[260], &[2])]
        {
            let case = Case::new(config(QkNormKind::LayerNorm, heads, dim), lengths, 3);
            let ways: Vec<Way> = blocks.iter().map(|&blocks| Way { blocks: Some(blocks), ..LONG }).collect();
            check(&case, &device, &ways);
        }
    }
}

/// Two and four heads of an image share a block, and the last ones may not exist.
#[test]
fn very_short_images() {
    for device in devices() {
        for (heads, dim) in [(5, 64), (3, 96)] {
            let case =
                Case::new(config(QkNormKind::LayerNormBias, heads, dim), &[1, 31, 0, 16, 17, 32, 33, 64], 0);
            check(&case, &device, &[SHORT]);
        }
    }
}

#[test]
fn one_image_and_none() {
    for device in devices() {
        check(&Case::new(config(QkNormKind::None, 2, 64), &[49], 0), &device, &[SHORT]);
        check(&Case::new(config(QkNormKind::Rms, 2, 64), &[0, 0, 0], 9), &device, &[SHORT, LONG]);
        check(&Case::new(config(QkNormKind::Rms, 2, 64), &[], 9), &device, &[LONG]);
    }
}

/// Where it was promised that no image is long, nothing is prepared for one.
#[test]
fn short_images_alone() {
    for device in devices() {
        let case = Case::new(config(QkNormKind::Rms, 1, 72), &[100, 0, 120, 90], 5);
        assert!(case.tokens > plan(&case, &device, SHORT).limits.short);
        check(&case, &device, &[Way { longest: Some(120), ..SHORT }]);
    }
}

/// Key blocks that wait for one another, as many as there are at a time: the same bits in every run, where there is
/// hardware on which they differ.
#[test]
fn turns_are_kept() {
    for device in devices().into_iter().filter(|device| device.info().driver.is_some()) {
        let case = Case::new(config(QkNormKind::Rms, 2, 64), &[4096, 700, 4100], 0);
        let (answer, dout) = (forward(&case, &device), dout(&case));
        let way = Way { blocks: None, ..SHORT };
        let first = run(&case, &device, way, &answer, &dout);
        for number in 1..50 {
            assert!(run(&case, &device, way, &answer, &dout) == first, "run {number}");
        }
    }
}

/// The largest image the design asks for, where there is hardware for it.
#[test]
fn one_token_beside_a_very_long_image() {
    for device in devices().into_iter().filter(|device| device.info().driver.is_some()) {
        let case = Case::new(config(QkNormKind::Rms, 2, 64), &[1, 16_384], 0);
        check(&case, &device, &[Way { blocks: None, ..SHORT }]);
    }
}

/// An image alone, and the same image behind others: the same bits.
#[test]
fn neighbours_do_not_matter() {
    for device in devices() {
        for way in [SHORT, LONG] {
            let length = 50;
            let together = Case::new(config(QkNormKind::Rms, 2, 80), &[70, length, 0, 45], 2);
            let mut alone = Case::new(together.config, &[length], 0);
            let row = together.qkv.len() / together.tokens;
            alone.qkv = together.qkv[70 * row..(70 + length) * row].to_vec();
            let forward = forward(&together, &device);
            let rows = |width: usize| 70 * width..(70 + length) * width;
            let answer = Answer {
                out: forward.out[rows(160)].to_vec(),
                lse: forward.lse[rows(2)].to_vec(),
                ..forward.clone()
            };
            let dout = dout(&together);
            let alone = run(&alone, &device, way, &answer, &dout[rows(160)]);
            let together = run(&together, &device, way, &forward, &dout);
            for (alone, together) in alone.rows.iter().zip(&together.rows) {
                assert!(alone[..] == together[rows(160)]);
            }
        }
    }
}

/// Long and short images at once, on grids of two sizes.
#[test]
fn the_same_bits_on_any_grid() {
    let case = Case::new(config(QkNormKind::LayerNormBias, 3, 88), &[70, 20, 7], 1);
    for device in devices() {
        let answer = forward(&case, &device);
        let mixed = Way { short: Some(32), ..SHORT };
        let [few, many] = [1, 7]
            .map(|blocks| run(&case, &device, Way { blocks: Some(blocks), ..mixed }, &answer, &dout(&case)));
        // Gradients of gains are summed over blocks first.
        assert!(few.rows == many.rows, "{:?}", device.info());
    }
    // As long as an image has no more key blocks than there are blocks.
    let case = Case::new(config(QkNormKind::Rms, 2, 64), &[300], 0);
    for device in devices() {
        let answer = forward(&case, &device);
        let [few, many] = [3, 4]
            .map(|blocks| run(&case, &device, Way { blocks: Some(blocks), ..LONG }, &answer, &dout(&case)));
        assert!(few.rows == many.rows, "{:?}", device.info());
    }
}

/// Orders of threads, warps and blocks, and times of copies.
#[cfg(feature = "emulator")]
#[test]
fn the_same_bits_in_any_order() {
    let case = Case::new(config(QkNormKind::LayerNormBias, 3, 88), &[70, 20, 7], 1);
    in_any_order(&case, Way { short: Some(32), ..SHORT });
    // Long, with two key blocks in shared memory, and two heads in a block.
    let case = Case::new(config(QkNormKind::Rms, 2, 64), &[20, 300, 150], 1);
    in_any_order(&case, Way { blocks: Some(2), ..SHORT });
    let turned = AttentionConfig { kv_heads: 1, rope: Rope::Halves, ..config(QkNormKind::Rms, 2, 72) };
    in_any_order(&Case::new(turned, &[20, 90, 40], 1), Way { short: Some(64), ..SHORT });
}

#[cfg(feature = "emulator")]
fn in_any_order(case: &Case, way: Way) {
    use trencadis::device::Device;
    use trencadis::device::emulator::{CopyPolicy, EmulatorOptions};

    let mut first = None;
    for (i, policy) in [CopyPolicy::AtIssue, CopyPolicy::AtWait, CopyPolicy::Random].into_iter().enumerate() {
        let device = Device::emulator(EmulatorOptions { policy, seed: 40 + i as u64, ..Default::default() });
        let (answer, _) = first.get_or_insert_with(|| (forward(case, &device), None));
        let got = run(case, &device, way, answer, &dout(case));
        if let Some((_, first)) = &mut first {
            assert!(*first.get_or_insert_with(|| got.clone()) == got, "{policy:?}");
        }
    }
}

#[test]
fn impossible_gradients_are_refused() {
    for device in devices() {
        let case = Case::new(config(QkNormKind::Rms, 2, 64), &[4], 0);
        let says = |change: &dyn Fn(&mut Case)| {
            let mut case = case.clone();
            change(&mut case);
            case.attention().backward_plan(device.info()).unwrap_err().to_string()
        };
        assert!(says(&|case| case.config.head_dim = 136).contains("head dim of 136"));
        assert!(says(&|case| case.config.scale = -1.0).contains("scale of -1"));

        let attention = case.attention();
        let plan = attention.backward_plan(device.info()).unwrap();
        let stream = device.stream().unwrap();
        let rows = device.zeros::<bf16>(4 * 128).unwrap();
        let row = Rows::dense(&rows, 128);
        let lse = device.zeros(8).unwrap();
        let cu_seqlens = device.upload(&[0, 4]).unwrap();
        let right = Schedule::new(&device, plan.limits, 4, 1).unwrap();
        let wrong =
            Schedule::new(&device, case.attention().plan(device.info()).unwrap().limits, 4, 1).unwrap();
        let (small, large) = (device.alloc::<u8>(8).unwrap(), device.alloc::<u8>(1 << 16).unwrap());
        let (gain, whole_gain) = (device.zeros::<f32>(63).unwrap(), device.zeros::<f32>(64).unwrap());
        let operands = Backward {
            q: row,
            k: row,
            v: row,
            out: row,
            lse: &lse,
            dout: row,
            affine: [None; 4],
            rope: None,
            cu_seqlens: &cu_seqlens,
            schedule: &right,
            dq: row,
            dk: row,
            dv: row,
            daffine: [None; 4],
            accumulate: None,
            workspace: &large,
        };
        let says = |operands| attention.backward(&stream, &plan, &operands).unwrap_err().to_string();
        assert!(
            says(Backward { schedule: &wrong, ..operands }).contains("the limits of this attention's plan")
        );
        let wanted = Backward { daffine: [Some(&whole_gain); 4], ..operands };
        assert!(says(Backward { workspace: &small, ..wanted }).contains("the workspace has 8 bytes"));
        assert!(
            says(Backward { daffine: [Some(&gain); 4], ..operands })
                .contains("the gradient of the gain of q")
        );
        let table = device.zeros::<f32>(4 * 64).unwrap();
        assert!(says(Backward { rope: Some(&table), ..operands }).contains("its config has no rotation"));
        let grouped = Attention { config: AttentionConfig { kv_heads: 1, ..attention.config }, ..attention };
        let refused =
            grouped.backward(&stream, &plan, &Backward { workspace: &small, ..operands }).unwrap_err();
        assert!(refused.to_string().contains("the workspace has 8 bytes"), "{refused}");
        let odd = Rows { offset: 4, ..row };
        assert!(says(Backward { dv: odd, ..operands }).contains("dv: offset 4"));
        let hopper = DeviceInfo { hopper: true, shared_per_block: 227 << 10, ..device.info().clone() };
        let foreign = BackwardPlan::new(64, &hopper).unwrap();
        if foreign != plan {
            let schedule = Schedule::new(&device, foreign.limits, 4, 1).unwrap();
            let operands = Backward { schedule: &schedule, ..operands };
            let refused = attention.backward(&stream, &foreign, &operands).unwrap_err().to_string();
            assert!(refused.contains("is for Hopper"), "{refused}");
        }
    }
}
