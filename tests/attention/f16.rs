//! The kernels of f16 against the CPU device in f64, on inputs rounded to f16. What is asked of them is as much more as f16
//! is finer than bf16.

use half::f16;

use trencadis::cpu::attention::AttentionConfig;
use trencadis::kernels::attention::ForwardPlan;
use trencadis::kernels::attention::instances::INSTANCES;
use trencadis::recipe::{QkNormKind, Rope};

use crate::case::{Case, Run, config};
use crate::gradients::{LONG, SHORT, Way, check};
use crate::support::devices::devices;

const KINDS: [QkNormKind; 4] =
    [QkNormKind::None, QkNormKind::Rms, QkNormKind::LayerNorm, QkNormKind::LayerNormBias];

/// Widths of the kernels and a head dim between them, forward; both schedules give the same bits.
#[test]
fn every_head_dim() {
    for device in devices() {
        for (i, dim) in INSTANCES.iter().map(|instance| instance.width).chain([40]).enumerate() {
            let case = Case::<f16>::of(config(KINDS[i % 4], 2, dim), &[16, 0, 65, 7, 1], 3);
            let statistics = case.config.norm != QkNormKind::None;
            let run = Run { statistics, ..Run::default() };
            let short = case.check(&device, run);
            let long = case.check(&device, Run { short: Some(0), pairs: Some(i % 2 == 0), ..run });
            assert!(short == long, "head dim {dim}: the schedules differ");
        }
    }
}

/// The kernels that are not taken without measuring: other numbers of warpgroups, and the portable ones on Hopper.
#[test]
fn every_plan() {
    for device in devices().into_iter().filter(|device| device.info().hopper) {
        let case = Case::<f16>::of(config(QkNormKind::Rms, 1, 72), &[70, 130, 9], 1);
        for plan in 0..ForwardPlan::plans(72, device.info()).len() {
            case.check(&device, Run { plan, short: Some(64), ..Run::default() });
        }
    }
}

/// Backward, by both schedules.
#[test]
fn every_gradient() {
    for device in devices() {
        for (i, instance) in INSTANCES.iter().enumerate() {
            let case = Case::<f16>::of(config(KINDS[(i + 1) % 4], 2, instance.width), &[16, 0, 65, 7, 1], 3);
            check(&case, &device, &[SHORT, LONG]);
        }
    }
}

/// Rows that are rotated, heads that share keys and values, and both; forward and backward, by both schedules.
#[test]
fn rotations_and_groups() {
    let rotated = AttentionConfig { rope: Rope::Interleaved, ..config(QkNormKind::Rms, 2, 80) };
    let grouped = AttentionConfig { kv_heads: 2, ..config(QkNormKind::None, 4, 64) };
    let both = AttentionConfig { kv_heads: 1, rope: Rope::Halves, ..config(QkNormKind::LayerNorm, 3, 72) };
    for device in devices() {
        for config in [rotated, grouped, both] {
            let case = Case::<f16>::of(config, &[16, 0, 65, 7], 3);
            let short = case.check(&device, Run::default());
            let long = case.check(&device, Run { short: Some(0), pairs: Some(false), ..Run::default() });
            assert!(short == long, "the schedules differ");
            check(&case, &device, &[SHORT, LONG]);
        }
    }
}

/// Key blocks of a long image, of a head dim between the widths.
#[test]
fn gradients_of_a_long_image() {
    for device in devices() {
        let case = Case::<f16>::of(config(QkNormKind::LayerNorm, 1, 48), &[300, 20], 3);
        check(&case, &device, &[Way { blocks: Some(2), ..LONG }]);
    }
}

/// Kernels of both elements are in one process, where functions of the same name would be one.
#[test]
fn beside_bf16() {
    for device in devices() {
        let config = config(QkNormKind::Rms, 1, 64);
        let before = Case::new(config, &[70, 9], 0);
        let first = before.check(&device, Run::default());
        let gradients = check(&before, &device, &[SHORT]);
        let case = Case::<f16>::of(config, &[70, 9], 0);
        case.check(&device, Run::default());
        check(&case, &device, &[SHORT]);
        assert!(before.check(&device, Run::default()) == first);
        assert!(check(&before, &device, &[SHORT]) == gradients);
    }
}
