//! The picture of a packed batch and the report on a data set.

mod support;

use std::sync::Arc;

use support::synthetic::Synthetic;
use trencadis::data::inspect::{DataReport, report};
use trencadis::data::preview::{augmentations, preview};
use trencadis::data::source::Dataset;
use trencadis::recipe::{CropKind, DropKind, PackingKind, Recipe, ResolutionKind};

fn dataset(train: Synthetic) -> Dataset {
    Dataset {
        classes: (0..10).map(|i| format!("class-{i}")).collect(),
        train: Arc::new(train),
        validation: Arc::new(Synthetic::new(3, 0.5, 2.0)),
        description: "synthetic".into(),
    }
}

fn recipe(kind: PackingKind) -> Recipe {
    let mut recipe = Recipe::default();
    recipe.packing.kind = kind;
    recipe.packing.tokens = 1024;
    recipe.packing.open = 8;
    recipe.resolution.kind = ResolutionKind::Uniform;
    recipe.resolution.max = 240;
    recipe.model.registers = 1;
    recipe
}

/// Colours that fill at least a cell's frame.
fn colours(path: &std::path::Path) -> (u32, u32, usize) {
    let picture = image::open(path).unwrap().to_rgb8();
    let hatch = picture.pixels().filter(|p| p.0 == [82, 87, 97]).count();
    (picture.width(), picture.height(), hatch)
}

#[test]
fn every_packing_and_patch_size_can_be_drawn() {
    let folder = tempfile::tempdir().unwrap();
    for (i, kind) in [PackingKind::Bins, PackingKind::Flat].into_iter().enumerate() {
        for patch in [4, 7, 16, 32] {
            for drop in [DropKind::None, DropKind::Beta] {
                let mut recipe = recipe(kind);
                recipe.model.patch = patch;
                recipe.resolution.max = (15 * patch).min(256);
                recipe.resolution.min = 2 * patch;
                recipe.drop.kind = drop;
                recipe.packing.lookahead = 1;
                let path = folder.path().join(format!("{i}-{patch}-{drop:?}.png"));
                let mut train = Synthetic::new(300, 0.3, 3.0);
                train.bad_pixels = vec![2, 5];
                preview(&dataset(train), &recipe, &path).unwrap();
                let (width, height, _) = colours(&path);
                assert!((640..3000).contains(&width) && (100..3000).contains(&height), "{width}x{height}");
            }
        }
    }
}

#[test]
fn padding_can_be_seen() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("batch.png");
    let mut recipe = recipe(PackingKind::Bins);
    // Squares of 10x10 patches and a register: two to a bin, 54 tokens of 256 stay empty.
    (recipe.resolution.kind, recipe.resolution.max) = (ResolutionKind::Fixed, 160);
    let sizes = vec![(160, 160); 50];
    preview(&dataset(Synthetic::with_sizes(sizes)), &recipe, &path).unwrap();
    let (_, _, hatch) = colours(&path);
    // A third of each of the 4 x 54 hatched cells of 16x16 pixels is light.
    let expected = 4 * 54 * 256 / 3;
    assert!(hatch.abs_diff(expected) < expected / 10 + 200, "{hatch} light pixels, {expected} expected");
}

#[test]
fn an_unwritable_file_is_named() {
    let dataset = dataset(Synthetic::new(20, 0.5, 2.0));
    let path = std::path::Path::new("no/such/folder/batch.png");
    let error = preview(&dataset, &recipe(PackingKind::Flat), path).unwrap_err();
    assert!(error.to_string().contains("no/such/folder/batch.png"), "{error}");
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn the_report_counts() {
    let mut sizes = vec![(100, 100); 30];
    sizes.extend(vec![(100, 150); 50]);
    sizes.extend(vec![(400, 100); 20]);
    let mut train = Synthetic::with_sizes(sizes);
    train.bad_sizes = vec![0];
    let mut recipe = recipe(PackingKind::Flat);
    (recipe.resolution.kind, recipe.resolution.max) = (ResolutionKind::Fixed, 128);
    let report = report(&dataset(train), &recipe, "photos").unwrap();
    assert_eq!((report.train, report.validation, report.classes), (100, 3, 10));
    assert_eq!((report.measured, report.unreadable), (100, 1));
    assert_eq!((report.height.min, report.height.median, report.height.max), (100, 100, 400));
    assert_eq!((report.width.min, report.width.median, report.width.max), (100, 150, 150));
    assert!((report.not_square - 70.0 / 99.0).abs() < 1e-9);
    let bar = |range: &str| report.aspect.iter().find(|bar| bar.range == range).unwrap().images;
    assert_eq!((bar("square"), bar("4:3 to 2:1"), bar("up to 1:3")), (29, 50, 20));
    assert_eq!(report.aspect.iter().map(|bar| bar.images).sum::<usize>(), 99);
    assert_eq!((report.most.images, report.least.images), (10, 10));
    // 8x8, 7x10 and 16x4 patches and one register.
    assert_eq!((report.tokens.min, report.tokens.max), (65, 71));
    assert!(report.packing.padding < 0.1);

    let text = report.to_string();
    println!("{text}");
    assert!(text.contains("not square  70.7 %") && text.contains("█"));
    for part in [
        "data        synthetic",
        "10 classes of 10 training images each",
        "unreadable  1 of 100",
        "synthetic-0: broken header",
        "  square       ███████████████████████",
        "29  29.3 %",
        "recipe      photos",
    ] {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
    assert!(!text.contains("dropped") && !text.contains("downscaled"), "{text}");
    let json = serde_json::to_string(&report).unwrap();
    let parsed: DataReport = serde_json::from_str(&json).unwrap();
    assert_eq!(parsed.packing.counts, report.packing.counts);
    assert_eq!((parsed.aspect, parsed.least), (report.aspect, report.least));
}

/// The five colours of the draws frame as many boxes and results.
#[test]
fn crops_are_drawn_on_the_originals_and_around_what_training_sees() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("augment.png");
    let mut recipe = recipe(PackingKind::Flat);
    let frames = |recipe: &Recipe, train: Synthetic| {
        augmentations(&dataset(train), recipe, "synthetic", &path).unwrap();
        let picture = image::open(&path).unwrap().to_rgb8();
        // Rose, the first colour: on the originals to the left of 576, and around results.
        let rose = |left: u32, right: u32| {
            picture
                .enumerate_pixels()
                .filter(|(x, _, p)| (left..right).contains(x) && p.0 == [250, 143, 118])
                .count()
        };
        (rose(0, 576), rose(576, picture.width()))
    };
    for channels in [1, 3] {
        recipe.model.channels = channels;
        recipe.data.mean = vec![0.5];
        recipe.data.std = vec![0.5];
        recipe.augment.crop = CropKind::None;
        let mut train = Synthetic::new(40, 0.3, 3.0);
        train.bad_pixels = (0..20).collect();
        let (boxes, results) = frames(&recipe, train);
        assert!(boxes > 12 * 100 && results == 0, "{boxes} {results}");
        recipe.augment.crop = CropKind::RandomResized;
        recipe.augment.rand_augment = "rand-m9-mstd0.5-inc1".into();
        let (_, results) = frames(&recipe, Synthetic::with_sizes(vec![(5, 3), (40, 400), (64, 64)]));
        assert!(results > 3 * 4 * 100, "{results}");
    }
    let mut broken = Synthetic::new(3, 0.5, 2.0);
    broken.bad_pixels = vec![0, 1, 2];
    let error = augmentations(&dataset(broken), &recipe, "synthetic", &path).unwrap_err();
    assert!(error.to_string().contains("none of the images can be read"), "{error}");
}
