//! Recipes that contradict themselves.

use trencadis::recipe::{CropKind, Recipe};

fn refused(sets: &[&str]) -> String {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    Recipe::load("vit-b16", &sets).unwrap_err().to_string()
}

#[test]
fn contradictions_are_refused_with_both_keys() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["augment.crop=simple", "resolution.aspect=native"], &["augment.crop", "resolution.aspect"]),
        (&["augment.crop=simple", "augment.padding=224"], &["augment.padding = 224", "resolution.max = 224"]),
        (
            &["augment.rand_augment=rand-m9-inc1", "augment.color_jitter=0.3"],
            &["augment.rand_augment", "augment.color_jitter"],
        ),
        (
            &["augment.rand_augment=rand-m9-inc1", "augment.three_augment=true"],
            &["augment.rand_augment", "augment.three_augment"],
        ),
        (&["eval.crop=0.9", "resolution.aspect=native"], &["eval.crop", "resolution.aspect"]),
        (&["eval.crop=1.1"], &["eval.crop", "eval.resolution"]),
        (&["augment.scale=[0.5, 1.2]"], &["augment.scale", "not larger than the image"]),
        (&["augment.scale=[0.5, 0.2]"], &["augment.scale"]),
        (&["augment.ratio=[2, 0.5]"], &["augment.ratio"]),
        (&["augment.repeats=0"], &["augment.repeats"]),
        (&["augment.color_jitter=1.5"], &["augment.color_jitter"]),
        (&["augment.crop=sample"], &["augment.crop", "did you mean \"simple\""]),
        (&["augment.scale=[0.5]"], &["augment.scale"]),
    ];
    for (sets, parts) in cases {
        let error = refused(sets);
        assert!(parts.iter().all(|part| error.contains(part)), "{sets:?}: {error}");
    }
}

#[test]
fn timms_notation_is_read_or_refused() {
    let mut recipe = Recipe::default();
    recipe.augment.rand_augment = "rand-m7-n3-p0.4-mstd0.5-inc1".into();
    let found = recipe.augment.rand_augment().unwrap().unwrap();
    assert_eq!((found.magnitude, found.layers, found.share, found.std), (7.0, 3, 0.4, 0.5));
    recipe.augment.rand_augment = "rand-inc1".into();
    let found = recipe.augment.rand_augment().unwrap().unwrap();
    assert_eq!((found.magnitude, found.layers, found.share, found.std), (10.0, 2, 0.5, 0.0));
    for text in [
        "augmix-m3",
        "rand-m9",
        "rand-m9-inc0",
        "rand-m11-inc1",
        "rand-m9-mmax20-inc1",
        "rand-tweights-inc1",
        "rand-m-inc1",
        "rand-n0-inc1",
        "rand-p2-inc1",
    ] {
        recipe.augment.rand_augment = text.into();
        let error = recipe.validate().unwrap_err().to_string();
        assert!(error.contains("augment.rand_augment") && error.contains(text), "{text}: {error}");
    }
}

#[test]
fn deit3_is_augmented_as_published() {
    for name in ["deit3-s16", "deit3-b16", "deit3-l16", "deit3-h14"] {
        let recipe = Recipe::load(name, &[]).unwrap();
        let augment = &recipe.augment;
        assert_eq!((augment.crop, augment.repeats), (CropKind::RandomResized, 3), "{name}");
        assert_eq!((augment.scale, augment.ratio), ([0.08, 1.0], [0.75, 4.0 / 3.0]), "{name}");
        assert_eq!((augment.three_augment, augment.color_jitter), (true, 0.3), "{name}");
        assert_eq!(recipe.eval.crop, 1.0, "{name}");
    }
    let plain = Recipe::load("vit-b16", &[]).unwrap();
    assert_eq!(plain.augment, Recipe::default().augment, "nothing is on by itself");
}
