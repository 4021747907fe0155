//! Token dropping: rates, counts, choice.

use trencadis::data::dropping::TokenDrop;
use trencadis::recipe::{DropConfig, DropKind};

fn config(kind: DropKind, mean: f64, max: f64) -> DropConfig {
    DropConfig { kind, mean, max }
}

#[test]
fn beta_has_the_papers_mean_and_variance() {
    for (mean, max) in [(0.53, 0.9), (0.25, 0.4), (0.4, 0.7)] {
        let config = config(DropKind::Beta, mean, max);
        let rates: Vec<f64> = (0..40_000).map(|s| TokenDrop::new(&config, 1, 0, s).rate()).collect();
        let n = rates.len() as f64;
        let m = rates.iter().sum::<f64>() / n;
        let variance = rates.iter().map(|r| (r - m).powi(2)).sum::<f64>() / n;
        let share = mean / max;
        let expected = 0.3 * share * (1.0 - share) * max * max;
        assert!(rates.iter().all(|r| (0.0..=max).contains(r)));
        assert!((m - mean).abs() < 0.005, "{m}");
        assert!((variance / expected - 1.0).abs() < 0.03, "{variance} {expected}");
    }
}

#[test]
fn the_kept_share_is_rounded_and_at_least_one() {
    let half = TokenDrop::new(&config(DropKind::Constant, 0.5, 0.9), 0, 0, 0);
    assert_eq!([1, 2, 3, 4, 100].map(|n| half.kept(n)), [1, 1, 2, 2, 50]);
    let most = TokenDrop::new(&config(DropKind::Constant, 0.99, 0.9), 0, 0, 0);
    assert_eq!(most.kept(10), 1);
    let none = TokenDrop::new(&config(DropKind::None, 0.5, 0.9), 0, 0, 0);
    assert_eq!(none.kept(17), 17);
    assert_eq!(none.indices(5), [0, 1, 2, 3, 4]);
}

#[test]
fn the_longest_image_is_exactly_the_longest() {
    for sample in 0..500 {
        let drop = TokenDrop::new(&config(DropKind::Beta, 0.53, 0.9), 2, 0, sample);
        for limit in [1, 2, 7, 255] {
            let longest = drop.longest(limit);
            assert!(drop.kept(longest) <= limit);
            assert!(drop.kept(longest + 1) > limit, "{} of {longest} at {}", limit, drop.rate());
        }
    }
}

#[test]
fn tokens_are_drawn_uniformly_without_replacement_in_raster_order() {
    let config = config(DropKind::Constant, 0.5, 0.9);
    let mut counts = [0u32; 12];
    for sample in 0..12_000 {
        let kept = TokenDrop::new(&config, 5, 1, sample).indices(12);
        assert_eq!(kept.len(), 6);
        assert!(kept.windows(2).all(|pair| pair[0] < pair[1]));
        kept.iter().for_each(|&i| counts[i as usize] += 1);
    }
    // Six standard deviations of a binomial with p = 1/2.
    assert!(counts.iter().all(|&c| (f64::from(c) - 6000.0).abs() < 6.0 * 54.8), "{counts:?}");
}

#[test]
fn the_choice_depends_on_seed_epoch_and_sample_alone() {
    let config = config(DropKind::Beta, 0.5, 0.9);
    let kept = |seed, epoch, sample| TokenDrop::new(&config, seed, epoch, sample).indices(196);
    assert_eq!(kept(1, 2, 3), kept(1, 2, 3));
    assert_ne!(kept(1, 2, 3), kept(2, 2, 3));
    assert_ne!(kept(1, 2, 3), kept(1, 3, 3));
    assert_ne!(kept(1, 2, 3), kept(1, 2, 4));
}
