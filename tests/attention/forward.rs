//! The forward kernels against the CPU device in f64, on inputs rounded to bf16.

use trencadis::kernels::attention::instances::INSTANCES;
use trencadis::recipe::QkNormKind;

use crate::case::{Case, Run, config};
use crate::support::devices::devices;

const KINDS: [QkNormKind; 4] =
    [QkNormKind::None, QkNormKind::Rms, QkNormKind::LayerNorm, QkNormKind::LayerNormBias];
/// All images by the long schedule.
const LONG: Run = Run { short: Some(0), blocks: None, statistics: false };
const SHORT: Run = Run { short: None, blocks: None, statistics: false };

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
            let long = case.check(&device, Run { statistics, ..LONG });
            assert!(short == long, "head dim {dim}: the schedules differ");
        }
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
        case.check(&device, Run { short: Some(64), blocks: Some(3), statistics: true });
    }
}

/// Two and four heads of an image share a block, and the last ones may not exist.
#[test]
fn very_short_images() {
    for device in devices() {
        for (heads, dim) in [(5, 64), (3, 96)] {
            let case =
                Case::new(config(QkNormKind::LayerNorm, heads, dim), &[1, 31, 0, 16, 17, 32, 33, 64], 0);
            case.check(&device, Run { blocks: Some(4), statistics: true, ..SHORT });
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
            for run in [SHORT, LONG] {
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
    let case = Case::new(config(QkNormKind::LayerNormBias, 3, 88), &[100, 20, 7, 200], 1);
    for run in [SHORT, LONG] {
        let mut first = None;
        for device in devices() {
            for blocks in [1, 7] {
                let answer = case.run(&device, Run { blocks: Some(blocks), statistics: true, ..run });
                let first = first.get_or_insert_with(|| (device.info().driver.clone(), answer.clone()));
                // A GPU's exponential is not the emulator's to the bit.
                if first.0 == device.info().driver {
                    assert!(first.1 == answer, "results differ on {blocks} blocks");
                }
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
        assert!(says(&|case| case.config.eps = -1.0).contains("epsilon"));
        assert!(says(&|case| case.config.heads = 0).contains("there must be a head"));
        assert!(says(&|case| case.tokens = 1 << 40).contains("2^30"));
    }
}
