//! Weights for another grid or another patch.

use std::path::Path;

use trencadis::recipe::{
    ModelConfig, PositionCombination, PositionConfig, PositionCoordinate, PositionResample,
};
use trencadis::weights::Weights;
use trencadis::weights::resize::{fit, resize_patch, resize_table};

fn close(name: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{name}");
    let worst = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{name}: {worst}");
}

fn goldens() -> Weights {
    Weights::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/position/resample.safetensors")).unwrap()
}

fn filter_of(name: &str) -> PositionResample {
    serde_json::from_value(name.into()).unwrap()
}

/// The same numbers that the filters are tested against when a batch is read.
#[test]
fn tables_are_resized_as_their_origins_do() {
    let goldens = goldens().tensors;
    let table = &goldens["table"].1;
    for (name, (_, want)) in goldens.iter().filter(|(name, _)| *name != "table" && !name.starts_with("patch"))
    {
        let (filter, grid) = name.rsplit_once(' ').unwrap();
        let filter = filter_of(filter.split(' ').next().unwrap());
        let (rows, columns) = grid.split_once('x').unwrap();
        let to = [rows.parse().unwrap(), columns.parse().unwrap()];
        let got = resize_table(table, [7, 7], to, filter).unwrap();
        close(name, &got, want, 2e-6);
        assert!(to != [7, 7] || got == *table, "{name}");
    }
}

/// timm's `resample_patch_embed`.
#[test]
fn patches_are_resized_by_the_pseudo_inverse() {
    let goldens = goldens().tensors;
    let kernel = &goldens["patch"].1;
    let mut cases = 0;
    for (name, (shape, want)) in goldens.iter().filter(|(name, _)| name.starts_with("patch ")) {
        let filter = filter_of(name.split(' ').nth(1).unwrap());
        close(name, &resize_patch(kernel, 3, 5, shape[3], filter).unwrap(), want, 1e-5);
        cases += 1;
    }
    assert_eq!(cases, 8);
    assert_eq!(resize_patch(kernel, 3, 5, 5, PositionResample::Bicubic).unwrap(), *kernel);
}

/// What the pseudo-inverse is for: a patch that grew has the embedding that it had.
#[test]
fn grown_patches_keep_their_embedding() {
    let (from, to, filter) = (5, 13, PositionResample::Bicubic);
    let kernel: Vec<f32> = (0..25).map(|i| ((i * i) % 11) as f32 / 7.0 - 0.5).collect();
    let patch: Vec<f32> = (0..25).map(|i| ((i * 7) % 25) as f32 / 9.0 - 1.0).collect();
    let grown_kernel = resize_patch(&kernel, 1, from, to, filter).unwrap();
    let grown_patch = resize_table(&patch, [from; 2], [to; 2], filter).unwrap();
    let embedding =
        |kernel: &[f32], patch: &[f32]| -> f32 { kernel.iter().zip(patch).map(|(w, x)| w * x).sum() };
    close("embedding", &[embedding(&grown_kernel, &grown_patch)], &[embedding(&kernel, &patch)], 1e-5);
}

/// Sizes that fit nothing are sentences.
#[test]
fn sizes_that_do_not_fit_are_refused() {
    let table = [0.0; 12];
    for (from, to) in [([5, 1], [2, 2]), ([0, 4], [2, 2]), ([3, 4], [0, 2]), ([usize::MAX, 2], [1, 1])] {
        let error = resize_table(&table, from, to, PositionResample::Linear).unwrap_err();
        assert!(error.to_string().contains("cannot be resampled"), "{error}");
    }
    for (channels, from, to) in [(3, 5, 4), (0, 2, 4), (3, 2, 0), (usize::MAX, 2, 1)] {
        assert!(resize_patch(&table, channels, from, to, PositionResample::Bicubic).is_err());
    }
}

fn model(patch: usize, rows: usize, columns: usize, combination: PositionCombination) -> ModelConfig {
    let position = PositionConfig {
        rows,
        columns,
        combination,
        coordinate: PositionCoordinate::Fractional,
        resample: PositionResample::BicubicNoAntialias,
        ..PositionConfig::default()
    };
    ModelConfig { patch, channels: 3, position, ..ModelConfig::default() }
}

fn weights(patch: usize, tables: &[(&str, usize)]) -> Weights {
    let mut weights = Weights::default();
    let mut put = |name: &str, shape: Vec<usize>| {
        let count = shape.iter().product::<usize>();
        let values = (0..count).map(|i| (i * i % 17) as f32 / 8.0 - 1.0).collect();
        weights.tensors.insert(name.into(), (shape, values));
    };
    put("patch_embed.weight", vec![4, 3 * patch * patch]);
    put("prefix", vec![1, 4]);
    tables.iter().for_each(|(name, rows)| put(name, vec![*rows, 4]));
    weights
}

#[test]
fn weights_are_fitted_to_another_grid_and_patch() {
    use PositionCombination::{Joint, Sum};
    let here = model(8, 5, 9, Joint);
    let mut there = model(6, 4, 4, Joint);
    let old = weights(6, &[("position.table", 16)]);
    let mut new = old.clone();
    let told = fit(&mut new, &mut there, &here).unwrap().unwrap();
    assert_eq!(
        told,
        "patch embedding from 6×6 to 8×8 pixels (pseudo-inverse), positions from 4×4 to 5×9 patches \
         (bicubic-no-antialias)"
    );
    assert_eq!((there.patch, there.position.rows, there.position.columns), (8, 5, 9));
    assert_eq!(new.tensors["patch_embed.weight"].0, [4, 3 * 64]);
    assert_eq!(new.tensors["position.table"].0, [45, 4]);
    assert_eq!(new.tensors["prefix"], old.tensors["prefix"]);
    let table = &old.tensors["position.table"].1;
    let want = resize_table(table, [4, 4], [5, 9], PositionResample::BicubicNoAntialias).unwrap();
    assert_eq!(new.tensors["position.table"].1, want);

    // A table of each axis is resampled along it.
    let (here, mut there) = (model(6, 6, 3, Sum), model(6, 4, 3, Sum));
    let mut new = weights(6, &[("position.row", 4), ("position.column", 3)]);
    let column = new.tensors["position.column"].clone();
    let told = fit(&mut new, &mut there, &here).unwrap().unwrap();
    assert_eq!(told, "positions from 4×3 to 6×3 patches (bicubic-no-antialias)");
    assert_eq!(new.tensors["position.row"].0, [6, 4]);
    assert_eq!(new.tensors["position.column"], column);
}

/// What stays for the check of shapes and settings to refuse.
#[test]
fn weights_of_another_kind_are_left_alone() {
    use PositionCombination::{Joint, Sum};
    let old = weights(6, &[("position.table", 16)]);
    let unchanged = |there: &ModelConfig, here: &ModelConfig| {
        let (mut new, mut told) = (old.clone(), there.clone());
        assert_eq!(fit(&mut new, &mut told, here).unwrap(), None);
        assert_eq!((&new, &told), (&old, there));
    };
    unchanged(&model(6, 4, 4, Joint), &model(6, 4, 4, Joint));
    unchanged(&model(6, 4, 4, Joint), &model(6, 5, 5, Sum));
    let norm = ModelConfig { patch_norm_in: true, ..model(6, 4, 4, Joint) };
    unchanged(&norm, &ModelConfig { patch: 8, ..norm.clone() });
    unchanged(&model(6, 4, 4, Joint), &ModelConfig { channels: 1, patch: 8, ..model(6, 4, 4, Joint) });
    // Rows under absolute coordinates stand for places that do not move.
    let absolute = |rows| {
        let mut model = model(6, rows, 4, Sum);
        model.position.coordinate = PositionCoordinate::Absolute;
        model
    };
    unchanged(&absolute(4), &absolute(6));
}
