//! Learning-rate schedules.

use crate::recipe::{ScheduleKind, TrainConfig};

/// Learning rate of `step`, counted from 0 to `config.steps − 1`.
///
/// Warm-up is `lr · (step + 1) / warmup`, so that the first step already learns. Then, with
/// `t = step − warmup`:
///
/// * cosine, linear: from `lr` to `lr_min`, which the last step uses;
/// * constant: `lr`, times the cool-down;
/// * rsqrt: `lr / √(1 + t / timescale)`, times the cool-down (big_vision); timescale 0 takes the
///   warm-up.
///
/// The cool-down is `min(1, (steps − step) / cooldown)`: a straight line that would reach zero
/// one step after the last.
///
/// A run that is shorter than its recipe's phases, as after `--set train.steps=1000`, shrinks
/// them in proportion: see [`phases`].
pub fn learning_rate(config: &TrainConfig, step: u64) -> f64 {
    let lr = config.lr;
    let (warmup, cooldown) = phases(config);
    let cooldown = match cooldown {
        0 => 1.0,
        n => (config.steps.saturating_sub(step) as f64 / n as f64).min(1.0),
    };
    if step < warmup {
        let warm = lr * (step + 1) as f64 / warmup as f64;
        return match config.schedule {
            ScheduleKind::Cosine | ScheduleKind::Linear => warm,
            ScheduleKind::Constant | ScheduleKind::Rsqrt => warm * cooldown,
        };
    }
    let t = (step - warmup) as f64;
    // Share of the way from the first step after the warm-up to the last step.
    let last = config.steps.saturating_sub(warmup + 1).max(1) as f64;
    let way = (t / last).min(1.0);
    let to_minimum = |remaining: f64| {
        let low = config.lr_min.min(lr);
        low + (lr - low) * remaining
    };
    match config.schedule {
        ScheduleKind::Cosine => to_minimum(0.5 * (1.0 + (std::f64::consts::PI * way).cos())),
        ScheduleKind::Linear => to_minimum(1.0 - way),
        ScheduleKind::Constant => lr * cooldown,
        ScheduleKind::Rsqrt => {
            let timescale = if config.timescale == 0 { warmup.max(1) } else { config.timescale };
            lr / (1.0 + t / timescale as f64).sqrt() * cooldown
        }
    }
}

/// Steps of warm-up and cool-down: the recipe's, or, where these do not fit into the run, shrunk
/// in proportion so that together they fill it (half of it for cosine and linear, which need
/// steps to come down in).
pub fn phases(config: &TrainConfig) -> (u64, u64) {
    let (cooldown, room) = match config.schedule {
        ScheduleKind::Cosine | ScheduleKind::Linear => (0, config.steps / 2),
        ScheduleKind::Constant | ScheduleKind::Rsqrt => (config.cooldown, config.steps),
    };
    let wanted = config.warmup.saturating_add(cooldown);
    if wanted <= config.steps {
        return (config.warmup, cooldown);
    }
    let share = |phase: u64| (u128::from(phase) * u128::from(room) / u128::from(wanted)) as u64;
    (share(config.warmup), share(cooldown))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KINDS: [ScheduleKind; 4] =
        [ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Constant, ScheduleKind::Rsqrt];

    fn config(schedule: ScheduleKind, steps: u64, warmup: u64, cooldown: u64) -> TrainConfig {
        TrainConfig { schedule, steps, warmup, cooldown, lr: 1e-3, lr_min: 1e-5, ..TrainConfig::default() }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-12 * b.abs()
    }

    #[test]
    fn a_short_run_shrinks_its_phases() {
        assert_eq!(phases(&config(ScheduleKind::Rsqrt, 1000, 10_000, 30_000)), (250, 750));
        assert_eq!(phases(&config(ScheduleKind::Cosine, 1000, 10_000, 0)), (500, 0));
        assert_eq!(phases(&config(ScheduleKind::Cosine, 1000, 100, 0)), (100, 0));
        assert_eq!(phases(&config(ScheduleKind::Rsqrt, 1, 10, 0)), (1, 0));
        let short = config(ScheduleKind::Rsqrt, 100, 10_000, 10_000);
        assert!(close(learning_rate(&short, 49), 1e-3), "the peak is reached");
    }

    #[test]
    fn known_points() {
        for kind in KINDS {
            let c = config(kind, 101, 10, 0);
            assert!(close(learning_rate(&c, 0), 1e-4), "{kind:?}");
            assert!(close(learning_rate(&c, 9), 1e-3) && close(learning_rate(&c, 10), 1e-3), "{kind:?}");
        }
        for kind in [ScheduleKind::Cosine, ScheduleKind::Linear] {
            let c = config(kind, 101, 10, 0);
            assert!(close(learning_rate(&c, 55), (1e-3 + 1e-5) / 2.0), "{kind:?}");
            assert!(close(learning_rate(&c, 100), 1e-5), "{kind:?}");
        }
        let quarter = learning_rate(&config(ScheduleKind::Cosine, 41, 0, 0), 10);
        assert!(close(quarter, 1e-5 + 0.99e-3 * (0.5 + 0.125f64.sqrt())), "{quarter}");
    }

    /// `train_vit_g.py` of big_vision: peak 8e-4, timescale and warm-up 10k, cool-down 50k, 1M steps.
    #[test]
    fn rsqrt_is_that_of_big_vision() {
        let c = TrainConfig {
            lr: 8e-4,
            timescale: 10_000,
            ..config(ScheduleKind::Rsqrt, 1_000_000, 10_000, 50_000)
        };
        for step in [10_000u64, 123_456, 949_999, 975_000, 999_999] {
            let cool = ((1_000_000 - step) as f64 / 50_000.0).min(1.0);
            let expected = 8e-4 / (1.0 + (step as f64 - 10_000.0) / 10_000.0).sqrt() * cool;
            assert!(close(learning_rate(&c, step), expected), "{step}");
        }
        let default = TrainConfig { timescale: 0, ..c.clone() };
        assert_eq!(learning_rate(&c, 500_000), learning_rate(&default, 500_000));
    }

    #[test]
    fn cooldown_is_a_line_to_zero() {
        let c = config(ScheduleKind::Constant, 100, 0, 20);
        assert_eq!(learning_rate(&c, 80), 1e-3);
        assert!(close(learning_rate(&c, 90), 0.5e-3) && close(learning_rate(&c, 99), 0.05e-3));
        assert_eq!(learning_rate(&c, 100), 0.0);
    }

    proptest! {
        #[test]
        fn bounded_and_continuous(
            kind in 0..4usize, steps in 1..400u64, warmup in 0..500u64, cooldown in 0..500u64,
            timescale in 0..50u64, lr_min in 0.0..2e-3,
        ) {
            let c = TrainConfig { timescale, lr_min, ..config(KINDS[kind], steps, warmup, cooldown) };
            let rates: Vec<_> = (0..steps).map(|s| learning_rate(&c, s)).collect();
            for (step, &rate) in rates.iter().enumerate() {
                prop_assert!(rate > 0.0 || c.lr_min == 0.0, "step {step}: {rate}");
                prop_assert!((0.0..=c.lr * (1.0 + 1e-12)).contains(&rate), "step {step}: {rate}");
            }
            // No step is larger than the steepest part of the schedule explains.
            let (warmup, cooldown) = phases(&c);
            let inverse = |n: u64| if n == 0 { 0.0 } else { 1.0 / n as f64 };
            let rest = steps.saturating_sub(warmup + 1).max(1);
            let scale = if timescale == 0 { warmup.max(1) } else { timescale };
            let slope = inverse(warmup) + inverse(cooldown) + match c.schedule {
                ScheduleKind::Cosine => std::f64::consts::FRAC_PI_2 * inverse(rest),
                ScheduleKind::Linear => inverse(rest),
                ScheduleKind::Constant => 0.0,
                ScheduleKind::Rsqrt => 0.5 * inverse(scale),
            };
            for pair in rates.windows(2) {
                prop_assert!((pair[1] - pair[0]).abs() <= c.lr * (slope + 1e-9), "{pair:?}");
            }
        }
    }
}
