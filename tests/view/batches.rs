//! Whole batches, assembled both ways.

use std::sync::Arc;

use trencadis::data::batch::{PackedBatch, Patches};
use trencadis::data::loader::{LoadedBatch, Loader};
use trencadis::data::source::Source;
use trencadis::recipe::*;

use crate::patches;
use crate::support::devices::devices;
use crate::support::synthetic::Synthetic;

pub fn recipe() -> Recipe {
    let mut recipe = Recipe::default();
    recipe.model.patch = 8;
    recipe.packing.tokens = 128;
    (recipe.resolution.min, recipe.resolution.max) = (16, 64);
    (recipe.drop.kind, recipe.drop.mean) = (DropKind::Constant, 0.25);
    recipe.data.workers = 2;
    recipe.data.max_unreadable = 0.9;
    recipe
}

/// The same batches with patches and with pictures.
fn both(recipe: &Recipe, source: &Arc<dyn Source>, count: usize) -> Vec<[LoadedBatch; 2]> {
    let [mut host, mut device] = [ViewsKind::Host, ViewsKind::Device].map(|views| {
        let mut recipe = recipe.clone();
        recipe.data.views = views;
        Loader::train(source.clone(), &recipe, None).unwrap()
    });
    (0..count).map(|_| [&mut host, &mut device].map(|loader| loader.next_batch().unwrap())).collect()
}

/// All but the patches.
fn rest(loaded: &LoadedBatch) -> String {
    let batch = PackedBatch { patches: Patches::U8(Vec::new()), ..loaded.batch.clone() };
    format!("{batch:?} {:?} {:?} {:?}", loaded.unreadable, loaded.unmixed, loaded.stats)
}

/// How many images of the batches there are, pictures, and pictures that are kept patches.
#[track_caller]
fn agree(recipe: &Recipe, source: Synthetic, count: usize) -> [usize; 3] {
    let (source, mut counts): (Arc<dyn Source>, _) = (Arc::new(source), [0; 3]);
    for [host, device] in both(recipe, &source, count) {
        assert_eq!(rest(&host), rest(&device));
        let (Patches::U8(want), Patches::Pictures(pictures)) = (&host.batch.patches, &device.batch.patches)
        else {
            panic!("patches and pictures")
        };
        counts[0] += host.batch.images;
        counts[1] += pictures.pictures.len();
        // No image is seen that small.
        counts[2] +=
            pictures.pictures.iter().filter(|picture| picture.size().1 == recipe.model.patch).count();
        for on in devices() {
            let got = patches(&on, pictures);
            let rows = got.chunks(host.batch.patch_dim).zip(want.chunks(host.batch.patch_dim));
            for (t, (got, want)) in rows.enumerate() {
                assert!(got == want, "token {t}: {got:?} instead of {want:?}");
            }
        }
    }
    counts
}

fn source() -> Synthetic {
    Synthetic::new(40, 0.4, 2.5)
}

#[test]
fn dropped_patches_and_prefix_tokens() {
    let mut recipe = recipe();
    (recipe.model.class_token, recipe.model.registers) = (true, 2);
    let [images, pictures, _] = agree(&recipe, source(), 3);
    assert!(images == pictures && images > 6);
    recipe.packing.kind = PackingKind::Bins;
    recipe.packing.sequence = 128;
    recipe.resolution.remainder = RemainderKind::Drop;
    agree(&recipe, source(), 2);
}

#[test]
fn grey_images() {
    let mut recipe = recipe();
    recipe.model.channels = 1;
    (recipe.data.mean, recipe.data.std) = (vec![0.4], vec![0.3]);
    recipe.augment.color_jitter = 0.5;
    (recipe.mix.mixup, recipe.mix.cutmix) = (0.8, 1.0);
    agree(&recipe, source(), 2);
}

#[test]
fn mixed_images_in_other_colours() {
    let mut recipe = recipe();
    (recipe.mix.mixup, recipe.mix.cutmix) = (0.8, 1.0);
    recipe.augment.color_jitter = 0.4;
    recipe.augment.crop = CropKind::RandomResized;
    recipe.resolution.aspect = AspectKind::Square;
    let [images, pictures, _] = agree(&recipe, source(), 3);
    assert!(pictures > images + images / 2, "{pictures} pictures of {images} images");
}

/// A third of the images is blurred, which the host does.
#[test]
fn operations_without_a_kernel() {
    let mut recipe = recipe();
    recipe.augment.three_augment = true;
    recipe.augment.crop = CropKind::Simple;
    recipe.resolution.aspect = AspectKind::Square;
    recipe.mix.mixup = 0.8;
    agree(&recipe, source(), 3);
}

/// Where nearly everything is dropped whole images have no room, and the host cuts what is kept.
#[test]
fn images_without_room() {
    let mut recipe = recipe();
    recipe.packing.tokens = 128;
    recipe.resolution.min = 64;
    recipe.drop.mean = 0.9;
    for mixed in [0.0, 1.0] {
        recipe.mix.cutmix = mixed;
        let [images, _, cut] = agree(&recipe, source(), 1);
        assert!(cut > images / 2, "{cut} of {images} images are cut by the host");
    }
}

#[test]
fn images_that_cannot_be_read() {
    let mut recipe = recipe();
    recipe.model.class_token = true;
    for mixed in [0.0, 0.8] {
        recipe.mix.mixup = mixed;
        let mut broken = source();
        (broken.bad_pixels, broken.panicking) = ((0..40).step_by(3).collect(), vec![11, 20]);
        agree(&recipe, broken, 4);
    }
}

/// A teacher with another prefix sees the same patches.
#[test]
fn a_prefix_comes_and_goes() {
    let mut recipe = recipe();
    recipe.model.class_token = true;
    let source: Arc<dyn Source> = Arc::new(source());
    for loaded in both(&recipe, &source, 1) {
        let [host, device] = loaded.map(|loaded| loaded.batch.with_prefix(1, 3, 256));
        let (Patches::U8(want), Patches::Pictures(pictures)) = (&host.patches, &device.patches) else {
            panic!("patches and pictures")
        };
        for on in devices() {
            assert!(patches(&on, pictures) == *want);
        }
    }
}
