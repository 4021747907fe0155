//! Target sizes: area, aspect ratio, distortion, limits, distributions.

use proptest::prelude::*;
use trencadis::data::resolution::{Limits, draw, ideal, mean_area, most_patches, target};
use trencadis::recipe::{AspectKind, RemainderKind, ResolutionConfig, ResolutionKind, ResolutionOf};
use trencadis::rng::{Purpose, Stream};

const NO_LIMIT: Limits = Limits::NONE;

fn config(kind: ResolutionKind, aspect: AspectKind, remainder: RemainderKind) -> ResolutionConfig {
    ResolutionConfig { kind, aspect, remainder, ..ResolutionConfig::default() }
}

fn plain(remainder: RemainderKind) -> ResolutionConfig {
    config(ResolutionKind::Fixed, AspectKind::Native, remainder)
}

fn draws(config: &ResolutionConfig) -> Vec<f64> {
    (0..20_000).map(|sample| draw(config, &mut Stream::new(3, 1, sample, Purpose::Resolution))).collect()
}

fn mean(values: impl Iterator<Item = f64> + Clone) -> f64 {
    values.clone().sum::<f64>() / values.count() as f64
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rounding_distorts_by_at_most_half_a_patch(
        h in 1usize..3000, w in 1usize..3000, patch in 1usize..40, r in 8.0f64..512.0,
    ) {
        let config = plain(RemainderKind::Round);
        let (height, width) = ideal(&config, (h, w), r);
        prop_assert!((height * width / (r * r) - 1.0).abs() < 1e-9);
        prop_assert!((height / width / (h as f64 / w as f64) - 1.0).abs() < 1e-9);
        let target = target(&config, patch, NO_LIMIT, (h, w), r);
        for (patches, pixels, side) in
            [(target.grid.rows, target.height, height), (target.grid.cols, target.width, width)]
        {
            prop_assert_eq!(pixels, patches * patch);
            prop_assert!(patches == 1 || (pixels as f64 - side).abs() <= patch as f64 / 2.0 + 1e-9);
            prop_assert!(patches > 1 || side <= 1.5 * patch as f64 + 1e-9);
        }
    }

    #[test]
    fn dropping_the_remainder_never_distorts(
        h in 1usize..3000, w in 1usize..3000, patch in 1usize..40, r in 8.0f64..512.0,
    ) {
        let config = plain(RemainderKind::Drop);
        let (height, width) = ideal(&config, (h, w), r);
        let target = target(&config, patch, NO_LIMIT, (h, w), r);
        for (patches, pixels, side) in
            [(target.grid.rows, target.height, height), (target.grid.cols, target.width, width)]
        {
            prop_assert_eq!(pixels, (side.round() as usize).max(patch));
            prop_assert_eq!(patches, pixels / patch);
        }
    }

    #[test]
    fn no_image_has_more_patches_than_the_most(
        h in 1usize..3000, w in 1usize..3000, patch in 1usize..40, most in 8.0f64..512.0, share in 0.1f64..=1.0,
        limit in prop_oneof![Just(usize::MAX), 1usize..300], axis in 1usize..400, round in any::<bool>(),
        square in any::<bool>(),
    ) {
        let remainder = if round { RemainderKind::Round } else { RemainderKind::Drop };
        let aspect = if square { AspectKind::Square } else { AspectKind::Native };
        let config = config(ResolutionKind::Fixed, aspect, remainder);
        let limits = Limits { patches: limit, rows: axis, cols: axis };
        let bound = most_patches(&config, patch, limits, most);
        prop_assert!(target(&config, patch, limits, (h, w), share * most).grid.patches() <= bound);
        if square {
            prop_assert_eq!(target(&config, patch, limits, (h, w), most).grid.patches(), bound);
        } else if axis < 2 * (most / patch as f64) as usize {
            // Close enough to be of use.
            prop_assert!(bound as f64 <= 2.25 * (most / patch as f64).powi(2) + axis as f64);
        }
    }

    #[test]
    fn the_largest_scale_that_fits_is_taken(
        h in 1usize..2000, w in 1usize..2000, patch in 4usize..32, r in 64.0f64..512.0,
        limit in 1usize..300, round in any::<bool>(),
    ) {
        let config = plain(if round { RemainderKind::Round } else { RemainderKind::Drop });
        let free = target(&config, patch, NO_LIMIT, (h, w), r);
        let bound = target(&config, patch, Limits { patches: limit, ..NO_LIMIT }, (h, w), r);
        prop_assert!(bound.grid.patches() <= limit);
        prop_assert_eq!(bound.downscaled, free.grid.patches() > limit);
        if !bound.downscaled {
            prop_assert_eq!(bound, free);
        } else {
            // No smaller resolution on a fine ladder fits and has more patches.
            for step in 1..1000 {
                let other = target(&config, patch, NO_LIMIT, (h, w), r * f64::from(step) / 1000.0);
                prop_assert!(
                    other.grid.patches() > limit || other.grid.patches() <= bound.grid.patches()
                );
            }
        }
    }

    #[test]
    fn native_sizes_are_never_enlarged(h in 1usize..600, w in 1usize..600) {
        let config = config(ResolutionKind::Native, AspectKind::Native, RemainderKind::Round);
        let (height, width) = ideal(&config, (h, w), 256.0);
        if h * w <= 256 * 256 {
            prop_assert_eq!((height, width), (h as f64, w as f64));
        } else {
            prop_assert!((height * width / 65536.0 - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn squares_are_square(h in 1usize..600, w in 1usize..600, r in 16.0f64..400.0) {
        let config = config(ResolutionKind::Uniform, AspectKind::Square, RemainderKind::Round);
        let target = target(&config, 16, NO_LIMIT, (h, w), r);
        prop_assert_eq!(target.grid.rows, target.grid.cols);
        prop_assert_eq!(target.grid.rows, ((r / 16.0).round() as usize).max(1));
    }
}

#[test]
fn known_targets() {
    // 640x480 at resolution 128: 147.8 x 110.9 pixels.
    let round = target(&plain(RemainderKind::Round), 16, NO_LIMIT, (480, 640), 128.0);
    assert_eq!((round.grid.rows, round.grid.cols, round.height, round.width), (7, 9, 112, 144));
    let drop = target(&plain(RemainderKind::Drop), 16, NO_LIMIT, (480, 640), 128.0);
    assert_eq!((drop.grid.rows, drop.grid.cols, drop.height, drop.width), (6, 9, 111, 148));
    // A line of pixels keeps its token count only as far as one row of patches goes.
    let line = target(&plain(RemainderKind::Round), 16, Limits { patches: 64, ..NO_LIMIT }, (1, 5000), 256.0);
    assert_eq!((line.grid.rows, line.downscaled), (1, true));
    assert_eq!(line.grid.cols, 64);
    // A table of 8 rows holds a tall image at the scale at which it is 8 patches tall.
    let tall = target(&plain(RemainderKind::Round), 16, Limits { rows: 8, ..NO_LIMIT }, (400, 100), 128.0);
    assert_eq!((tall.grid.rows, tall.grid.cols, tall.downscaled), (8, 2, true));
    // Positions are 16 bits wide.
    let endless = target(&plain(RemainderKind::Round), 1, NO_LIMIT, (1, 1_000_000), 1000.0);
    assert!(endless.grid.cols < 65535 && endless.downscaled);
}

#[test]
fn distributions_have_their_moments() {
    let base = ResolutionConfig { min: 64, max: 384, ..plain(RemainderKind::Round) };
    assert!(draws(&base).iter().all(|&r| r == 384.0));

    let uniform = ResolutionConfig { kind: ResolutionKind::Uniform, ..base.clone() };
    let sides = draws(&uniform);
    assert!(sides.iter().all(|r| (64.0..=384.0).contains(r)));
    assert!((mean(sides.iter().copied()) - 224.0).abs() < 3.0);

    let area = ResolutionConfig { of: ResolutionOf::Area, ..uniform };
    let areas = draws(&area);
    let expected = (64.0f64.powi(2) + 384.0f64.powi(2)) / 2.0;
    assert!((mean(areas.iter().map(|r| r * r)) / expected - 1.0).abs() < 0.02);
    assert!((mean_area(&area) / expected - 1.0).abs() < 1e-3);

    // E[u] of N(-0.5, 1) cut to [-1, 1] is m + (φ(a) − φ(b))/(Φ(b) − Φ(a)), a = -0.5, b = 1.5.
    let normal = ResolutionConfig { kind: ResolutionKind::TruncatedNormal, mean: -0.5, std: 1.0, ..base };
    let sides = draws(&normal);
    assert!(sides.iter().all(|r| (64.0..=384.0).contains(r)));
    let u = -0.5 + (0.352_065 - 0.129_518) / (0.933_193 - 0.308_538);
    assert!((mean(sides.iter().copied()) - (64.0 + (u + 1.0) / 2.0 * 320.0)).abs() < 3.0);
    assert!((mean_area(&normal) / mean(sides.iter().map(|r| r * r)) - 1.0).abs() < 0.02);
}
