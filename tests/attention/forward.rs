//! The forward kernels against the CPU device in f64, on inputs rounded to bf16.

use trencadis::cpu::attention::AttentionConfig;
use trencadis::device::Device;
use trencadis::kernels::Rows;
use trencadis::kernels::attention::instances::INSTANCES;
use trencadis::kernels::attention::{Attention, Forward, ForwardPlan, Limits, Schedule, Statistics};
use trencadis::recipe::{QkNormKind, Rope};

use crate::case::{Case, Run, config, rotations};
use crate::support::devices::devices;

const KINDS: [QkNormKind; 4] =
    [QkNormKind::None, QkNormKind::Rms, QkNormKind::LayerNorm, QkNormKind::LayerNormBias];
/// All images by the long schedule.
const LONG: Run = Run { short: Some(0), ..SHORT };
const SHORT: Run = Run { short: None, blocks: None, statistics: false, longest: None, plan: 0, pairs: None };
/// The same in pairs, and each block by itself.
const PAIRS: Run = Run { pairs: Some(true), ..LONG };
const ALONE: Run = Run { pairs: Some(false), ..LONG };

fn bits(x: &[half::bf16]) -> Vec<u16> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Widths of the kernels and head dims between them; both schedules give the same bits.
#[test]
fn every_head_dim() {
    let between = [8, 40, 120];
    for device in devices() {
        for (i, dim) in INSTANCES.iter().map(|instance| instance.width).chain(between).enumerate() {
            let case = Case::new(config(KINDS[i % 4], 2, dim), &[16, 0, 65, 7, 130, 1], 3);
            let statistics = case.config.norm != QkNormKind::None;
            let short = case.check(&device, Run { statistics, ..SHORT });
            let long = case.check(&device, Run { statistics, ..ALONE });
            assert!(short == long, "head dim {dim}: the schedules differ");
            if device.info().hopper && !between.contains(&dim) {
                let pairs = case.run(&device, Run { statistics, ..PAIRS });
                assert!(pairs == long, "head dim {dim}: pairs differ");
            }
        }
    }
}

/// Rotated rows, heads that share keys and values, and both; both schedules give the same bits.
#[test]
fn rotations_and_groups() {
    for device in devices() {
        for config in rotations() {
            let case = Case::new(config, &[16, 0, 65, 7, 130, 1], 3);
            let statistics = config.norm != QkNormKind::None;
            let short = case.check(&device, Run { statistics, ..SHORT });
            let long = case.check(&device, Run { statistics, ..ALONE });
            assert!(short == long, "{config:?}: the schedules differ");
            if device.info().hopper && config.head_dim == 80 {
                let pairs = case.run(&device, Run { statistics, ..PAIRS });
                assert!(pairs == long, "{config:?}: pairs differ");
            }
        }
    }
}

/// Heads that share keys and values have the bits of heads that have the same ones each for itself.
#[test]
fn groups_are_repeated_heads() {
    let config = AttentionConfig { kv_heads: 2, ..config(QkNormKind::LayerNorm, 6, 64) };
    for config in [config, AttentionConfig { rope: Rope::Halves, gain_per_head: true, ..config }] {
        // Of the first some share a block.
        let shared = Case::new(config, &[9, 20, 150, 0, 33], 2);
        for device in devices() {
            for run in [SHORT, LONG] {
                let run = Run { statistics: true, ..run };
                let (together, each) = (shared.run(&device, run), shared.ungrouped().run(&device, run));
                assert!(bits(&together.out) == bits(&each.out) && together.lse == each.lse);
                let [q_mean, q_rstd, k_mean, k_rstd] = &together.statistics;
                assert!(*q_mean == each.statistics[0] && *q_rstd == each.statistics[1]);
                for (kept, all) in [k_mean, k_rstd].into_iter().zip(&each.statistics[2..]) {
                    let firsts: Vec<f32> = all.iter().step_by(3).copied().collect();
                    assert!(*kept == firsts);
                }
            }
        }
    }
}

/// Angles of zero leave the bits as they are without a rotation.
#[test]
fn no_angle_is_no_rotation() {
    for device in devices() {
        for (norm, dim) in [(QkNormKind::None, 72), (QkNormKind::LayerNormBias, 64)] {
            let plain = Case::new(config(norm, 2, dim), &[100, 17], 1);
            for rope in [Rope::Interleaved, Rope::Halves] {
                let mut case = plain.clone();
                case.config.rope = rope;
                case.rope = Some([1.0, 0.0].repeat(case.tokens * dim / 2));
                for run in [SHORT, LONG] {
                    assert!(case.run(&device, run) == plain.run(&device, run), "{norm:?} {rope:?}");
                }
            }
        }
    }
}

/// Every kernel that serves a head dim. Hopper's agree bit by bit, however many warpgroups multiply.
#[test]
fn every_plan() {
    for device in devices() {
        for (dim, kind) in [(64, QkNormKind::LayerNorm), (80, QkNormKind::None)] {
            let case = Case::new(config(kind, 2, dim), &[70, 200, 9], 1);
            let plans = ForwardPlan::plans(dim, device.info());
            assert_eq!(plans.len() > 1, device.info().hopper);
            let mut hopper = None;
            for (plan, found) in plans.iter().enumerate() {
                // Of one kernel, plans differ in what they do with long images.
                let another = plans[..plan].iter().any(|plan| plan.instance == found.instance);
                for short in [None, Some(64)].into_iter().skip(usize::from(another)) {
                    let answer = case.check(&device, Run { plan, short, blocks: Some(2), ..SHORT });
                    if found.instance.hopper.is_some() {
                        let hopper = hopper.get_or_insert_with(|| answer.clone());
                        assert!(*hopper == answer, "head dim {dim}: the plans differ");
                    }
                }
            }
        }
    }
}

/// Lengths around the multiples of 16 and 64: tails of up to 16 rows, last keys of 16, 32, 48 and 64.
#[test]
fn every_length() {
    let runs = [1..21, 47..50, 60..84, 95..98, 111..114, 127..130, 142..147, 191..194];
    let lengths: Vec<usize> = runs.into_iter().flatten().collect();
    for device in devices() {
        let case = Case::new(config(QkNormKind::Rms, 1, 72), &lengths, 0);
        let short = case.check(&device, SHORT);
        let long = case.check(&device, LONG);
        assert!(short == long, "the schedules differ");
    }
}

/// A ring that one image fills to the last stage, and one that has a row more than it.
#[test]
fn the_longest_short_image() {
    for device in devices() {
        let config = config(QkNormKind::Rms, 1, 128);
        let short = ForwardPlan::new(128, device.info()).unwrap().limits.short;
        let case = Case::new(config, &[short, 3, short + 1, 20, short], 0);
        case.check(&device, Run { blocks: Some(1), statistics: true, ..SHORT });
    }
}

#[test]
fn norms_and_gains() {
    for device in devices() {
        for kind in KINDS {
            for per_head in [false, true] {
                let mut config = config(kind, 3, 72);
                config.gain_per_head = per_head;
                config.scale = 0.2;
                config.eps = 1e-2;
                let case = Case::new(config, &[33, 5], 2);
                case.check(&device, SHORT);
                for missing in [[0, 1], [2, 3]] {
                    let mut case = case.clone();
                    for i in missing {
                        case.affine[i] = None;
                    }
                    case.check(&device, if missing[0] == 0 { SHORT } else { LONG });
                }
            }
        }
    }
}

/// Every way a length can meet warps, steps of keys and schedules, in one batch that fills its budget.
#[test]
fn ragged_batch() {
    for device in devices() {
        let case = Case::new(config(QkNormKind::Rms, 1, 64), &[64, 577, 0, 1, 257, 16, 196, 130, 0], 0);
        case.check(&device, SHORT);
        case.check(
            &device,
            Run { short: Some(64), blocks: Some(3), statistics: true, longest: Some(577), ..SHORT },
        );
    }
}

/// Two and four heads of an image share a block, and the last ones may not exist.
#[test]
fn very_short_images() {
    for device in devices() {
        for (heads, dim) in [(5, 64), (3, 96)] {
            let case =
                Case::new(config(QkNormKind::LayerNorm, heads, dim), &[1, 31, 0, 16, 17, 32, 33, 64], 0);
            case.check(&device, Run { blocks: Some(4), statistics: true, longest: Some(64), ..SHORT });
        }
    }
}

#[test]
fn one_image_and_none() {
    for device in devices() {
        Case::new(config(QkNormKind::None, 2, 64), &[49], 0).check(&device, SHORT);
        Case::new(config(QkNormKind::Rms, 2, 64), &[0, 0, 0], 9).check(&device, SHORT);
        Case::new(config(QkNormKind::Rms, 2, 64), &[], 9).check(&device, LONG);
    }
}

#[test]
fn one_token_beside_a_long_image() {
    for device in devices() {
        let case = Case::new(config(QkNormKind::LayerNormBias, 1, 64), &[1, 1100], 1);
        case.check(&device, Run { statistics: true, ..SHORT });
    }
}

/// The largest image the design asks for, where there is hardware for it.
#[test]
fn one_token_beside_a_very_long_image() {
    for device in devices().into_iter().filter(|device| device.info().driver.is_some()) {
        Case::new(config(QkNormKind::Rms, 2, 64), &[1, 16_384], 0).check(&device, SHORT);
    }
}

/// An image alone, and the same image behind others: the same bits.
#[test]
fn neighbours_do_not_matter() {
    for device in devices() {
        for length in [50, 150] {
            for run in [SHORT, LONG, PAIRS] {
                let together = Case::new(config(QkNormKind::Rms, 2, 80), &[70, length, 0, 45], 2);
                let row = together.qkv.len() / together.tokens;
                let mut alone = Case::new(together.config, &[length], 0);
                alone.qkv = together.qkv[70 * row..(70 + length) * row].to_vec();
                let (alone, together) = (alone.run(&device, run), together.run(&device, run));
                let rows = |width: usize| 70 * width..(70 + length) * width;
                assert!(bits(&alone.out) == bits(&together.out[rows(2 * 80)]), "result, {length} rows");
                assert!(alone.lse == together.lse[rows(2)], "log-sum-exp, {length} rows");
            }
        }
    }
}

/// Orders of threads and times of copies, as the emulators have them, and grids of any size.
#[test]
fn the_same_bits_in_any_order() {
    any_order(&Case::new(config(QkNormKind::LayerNormBias, 2, 88), &[100, 20, 7], 1));
    any_order(&Case::new(config(QkNormKind::Rms, 2, 64), &[150, 17], 1));
    let turned = AttentionConfig { kv_heads: 1, rope: Rope::Halves, ..config(QkNormKind::Rms, 2, 72) };
    any_order(&Case::new(turned, &[90, 9], 1));
}

fn any_order(case: &Case) {
    let groups = orders();
    for run in [SHORT, LONG] {
        for group in &groups {
            let mut first = None;
            for device in group {
                for blocks in [1, 7] {
                    let answer = case.run(device, Run { blocks: Some(blocks), statistics: true, ..run });
                    let first = first.get_or_insert_with(|| answer.clone());
                    assert!(*first == answer, "results differ on {blocks} blocks");
                }
            }
        }
    }
}

/// Devices that must agree bit by bit.
fn orders() -> Vec<Vec<Device>> {
    #[allow(unused_mut)]
    let mut groups: Vec<Vec<Device>> = devices().into_iter().map(|device| vec![device]).collect();
    #[cfg(feature = "emulator")]
    groups.push(emulators());
    groups
}

#[cfg(feature = "emulator")]
fn emulators() -> Vec<Device> {
    use trencadis::device::emulator::{CopyPolicy, EmulatorOptions};
    let policies = [CopyPolicy::AtIssue, CopyPolicy::AtWait, CopyPolicy::Random, CopyPolicy::Random];
    let options = (0..).zip(policies).map(|(seed, policy)| EmulatorOptions {
        seed,
        policy,
        resident_blocks: 1 + seed as usize,
        ..EmulatorOptions::default()
    });
    options.map(Device::emulator).collect()
}

/// Odd numbers of tiles, of which one block of the last pair has none; a few rows more than a tile; short images
/// behind. In pairs they have the bits that they have by themselves, in any order and on any grid.
#[test]
fn pairs_do_not_matter() {
    let cases: [(usize, &[usize]); 2] = [(2, &[260, 20, 130, 0, 90, 120]), (3, &[193, 0, 100, 30])];
    for group in orders() {
        let group: Vec<&Device> = group.iter().filter(|device| device.info().hopper).collect();
        for (warpgroups, lengths) in cases {
            let case = Case::new(config(QkNormKind::LayerNorm, 1, 64), lengths, 1);
            let mut alone = None;
            for (device, blocks) in group.iter().zip([1, 6].into_iter().cycle()) {
                let plans = ForwardPlan::plans(64, device.info());
                let plan = plans.iter().position(|plan| plan.instance.hopper == Some(warpgroups)).unwrap();
                let run = Run { plan, short: Some(64), statistics: true, ..SHORT };
                let alone =
                    alone.get_or_insert_with(|| case.check(device, Run { pairs: Some(false), ..run }));
                let pairs = case.run(device, Run { blocks: Some(blocks), pairs: Some(true), ..run });
                assert!(*alone == pairs, "{warpgroups} warpgroups: pairs on {blocks} blocks differ");
            }
        }
        for device in group {
            for lengths in [&[][..], &[0, 0]] {
                Case::new(config(QkNormKind::Rms, 2, 64), lengths, 9).check(device, PAIRS);
            }
        }
    }
}

#[test]
fn impossible_attention_is_refused() {
    for device in devices() {
        let case = Case::new(config(QkNormKind::Rms, 2, 64), &[4], 0);
        let says = |change: &dyn Fn(&mut Case)| {
            let mut case = case.clone();
            change(&mut case);
            case.attention().plan(device.info()).unwrap_err().to_string()
        };
        assert!(says(&|case| case.config.head_dim = 136).contains("head dim of 136"));
        assert!(says(&|case| case.config.head_dim = 60).contains("multiple of 8"));
        assert!(says(&|case| case.config.scale = 0.0).contains("scale of 0"));
        assert!(says(&|case| case.config.scale = -1.0).contains("scale of -1"));
        assert!(says(&|case| case.config.eps = -1.0).contains("epsilon of -1"));
        assert!(says(&|case| case.config.eps = 0.0).contains("epsilon of 0"));
        assert!(says(&|case| case.config.heads = 0).contains("there must be a head"));
        let many = says(&|case| (case.config.heads, case.config.kv_heads) = (4097, 4097));
        assert!(many.contains("4097 heads, expected 1 to 4096"), "{many}");
        assert!(says(&|case| case.config.heads = 3).contains("3 heads of queries and 2 of keys and values"));
        assert!(
            says(&|case| case.config.kv_heads = 0).contains("2 heads of queries and 0 of keys and values")
        );
        assert!(says(&|case| case.config.kv_heads = 4).contains("a number of these that divides the other"));
        assert!(says(&|case| case.tokens = 1 << 40).contains("2^30"));
        assert!(says(&|case| case.tokens = usize::MAX).contains("2^30"));
    }
}

/// Operands that do not fit are told by name, and nothing is launched.
#[test]
fn operands_that_do_not_fit_are_refused() {
    for device in devices() {
        let case = Case::new(config(QkNormKind::None, 2, 64), &[4], 0);
        let attention = case.attention();
        let plan = case.plan(&device, SHORT);
        let stream = device.stream().unwrap();
        let (qkv, out) = (device.upload(&case.qkv).unwrap(), device.zeros(4 * 128).unwrap());
        let (lse, few) = (device.zeros(8).unwrap(), device.zeros(7).unwrap());
        let cu_seqlens = device.upload(&case.cu_seqlens).unwrap();
        let schedule = Schedule::new(&device, plan.limits, 4, 1).unwrap();
        let never = Schedule::new(&device, plan.limits, 4, 1).unwrap();
        schedule.launch(&stream, &cu_seqlens, Some(&case.cu_seqlens)).unwrap();
        let other = Schedule::new(&device, Limits { short: 16, ..plan.limits }, 4, 1).unwrap();
        let larger = Schedule::new(&device, plan.limits, 5, 1).unwrap();
        let rows = |offset, stride| Rows { buffer: &qkv, offset, stride };
        let statistics = Statistics { q_mean: &lse, q_rstd: &lse, k_mean: &lse, k_rstd: &lse };
        let good = Forward {
            q: rows(0, 392),
            k: rows(128, 392),
            v: rows(256, 392),
            affine: [None; 4],
            rope: None,
            cu_seqlens: &cu_seqlens,
            schedule: &schedule,
            out: Rows::dense(&out, 128),
            lse: &lse,
            statistics: None,
            workspace: None,
        };
        let says = |bad: Forward<'_>| attention.forward(&stream, &plan, &bad).unwrap_err().to_string();
        assert!(says(Forward { q: rows(4, 392), ..good }).contains("q: offset 4"));
        assert!(says(Forward { k: rows(128, 390), ..good }).contains("k: offset 128 and row stride 390"));
        assert!(says(Forward { v: rows(272, 392), ..good }).contains("v: 4 rows"));
        assert!(says(Forward { out: Rows::dense(&out, 120), ..good }).contains("out: rows of 128"));
        assert!(says(Forward { lse: &few, ..good }).contains("lse has 7 elements"));
        assert!(says(Forward { schedule: &other, ..good }).contains("limits of this attention's plan"));
        assert!(says(Forward { schedule: &larger, ..good }).contains("of the same size"));
        assert!(says(Forward { schedule: &never, ..good }).contains("not made from this cu_seqlens"));
        assert!(says(Forward { statistics: Some(statistics), ..good }).contains("only made with a QK-norm"));
        assert!(out.download().unwrap().iter().all(|x| x.to_bits() == 0));
        assert!(says(Forward { cu_seqlens: &device.zeros(3).unwrap(), ..good }).contains("cu_seqlens has 3"));
        let table = device.zeros::<f32>(4 * 64).unwrap();
        assert!(says(Forward { rope: Some(&table), ..good }).contains("its config has no rotation"));
        let rotated =
            Attention { config: AttentionConfig { rope: Rope::Halves, ..attention.config }, ..attention };
        let says = |bad: Forward<'_>| rotated.forward(&stream, &plan, &bad).unwrap_err().to_string();
        assert!(says(good).contains("(Halves) needs their table"));
        assert!(
            says(Forward { rope: Some(&lse), ..good })
                .contains("rotary positions has 8 elements, expected 256")
        );
        let grouped = Attention { config: AttentionConfig { kv_heads: 1, ..attention.config }, ..attention };
        // Rows of one head are half as wide: what was refused fits.
        grouped.forward(&stream, &plan, &Forward { v: rows(272, 392), ..good }).unwrap();
        stream.synchronize().unwrap();
        let normed = Attention { config: config(QkNormKind::Rms, 2, 64), ..attention };
        let bad = Forward { affine: [Some(&few), None, None, None], ..good };
        let told = normed.forward(&stream, &plan, &bad).unwrap_err().to_string();
        assert!(told.contains("the gain of q has 7 elements, expected 64"), "{told}");
        // Views begin wherever an element may lie, which is not wherever 16 bytes are read.
        let room = device.zeros::<f32>(4 * 64 + 1).unwrap();
        let shifted = |len: usize| room.view::<f32>(4..4 + 4 * len).unwrap();
        let bad = Forward { affine: [None, None, Some(&shifted(64)), None], ..good };
        let told = normed.forward(&stream, &plan, &bad).unwrap_err().to_string();
        assert!(told.contains("the gain of k lies at") && told.contains("multiple of 16 bytes"), "{told}");
        let told = says(Forward { rope: Some(&shifted(4 * 64)), ..good });
        assert!(told.contains("rotary positions lies at") && told.contains("multiple of 16 bytes"), "{told}");
        let plan = ForwardPlan::with_short_limit(plan.instance, 0, device.info()).unwrap();
        let bytes = normed.forward_workspace_bytes(&plan, 4);
        assert_eq!(bytes, if plan.instance.hopper.is_some() { 4 * 2 * 64 * 2 } else { 0 });
        assert_eq!(attention.forward_workspace_bytes(&plan, 4), 0, "there is no norm");
        if bytes > 0 {
            let schedule = Schedule::new(&device, plan.limits, 4, 1).unwrap();
            schedule.launch(&stream, &cu_seqlens, Some(&case.cu_seqlens)).unwrap();
            let (bad, few) = (Forward { schedule: &schedule, ..good }, device.zeros(bytes - 1).unwrap());
            let says = |bad| normed.forward(&stream, &plan, &bad).unwrap_err().to_string();
            assert!(says(bad).contains("needs a workspace of 1024 bytes"));
            assert!(says(Forward { workspace: Some(&few), ..bad }).contains("the workspace has 1023 bytes"));
            let shifted = device.zeros::<u8>(bytes + 4).unwrap().view(4..bytes + 4).unwrap();
            assert!(says(Forward { workspace: Some(&shifted), ..bad }).contains("the workspace lies at"));
        }
    }
}
