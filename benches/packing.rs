//! Images per second of planning, of augmentation and of cutting into patches, on one thread.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use trencadis::data::frame::Frame;
use trencadis::data::packing::{PackingSettings, PlannedImage};
use trencadis::data::patchify::Patchifier;
use trencadis::data::planner::Planner;
use trencadis::data::resolution::{Limits, target};
use trencadis::data::source::{Image, Source};
use trencadis::data::view::{ViewSettings, Viewer};
use trencadis::recipe::{DropKind, PackingKind, Recipe};
use trencadis::{Error, Result};

/// Sizes only, with aspect ratios from 1:2 to 2:1.
struct Sizes(usize);

impl Source for Sizes {
    fn len(&self) -> usize {
        self.0
    }

    fn name(&self, index: usize) -> String {
        index.to_string()
    }

    fn label(&self, _: usize) -> usize {
        0
    }

    fn size(&self, index: usize) -> Result<(usize, usize)> {
        let aspect = 2f64.powf(2.0 * (index as f64 * 0.618_033_988_749_895).fract() - 1.0);
        Ok(((400.0 * aspect.sqrt()) as usize, (400.0 / aspect.sqrt()) as usize))
    }

    fn load(&self, _: usize, _: usize) -> Result<Image> {
        Err(Error::failure("this source has sizes only"))
    }
}

fn plan(c: &mut Criterion) {
    let mut group = c.benchmark_group("plan");
    for kind in [PackingKind::Bins, PackingKind::Flat] {
        let mut recipe = Recipe::default();
        recipe.packing.kind = kind;
        recipe.packing.tokens = 16384;
        (recipe.drop.kind, recipe.drop.mean) = (DropKind::Beta, 0.53);
        let settings = PackingSettings::train(&recipe).expect("a valid recipe");
        let mut planner = Planner::new(Arc::new(Sizes(1 << 16)), settings, None).expect("a planner");
        // About 311 images a batch of 16384 tokens.
        group.throughput(Throughput::Elements(311));
        group.bench_function(BenchmarkId::from_parameter(format!("{kind:?}")), |b| {
            b.iter(|| black_box(planner.next_batch().expect("a batch")));
        });
    }
}

/// One image, in memory.
struct One(Image);

impl Source for One {
    fn len(&self) -> usize {
        1
    }

    fn name(&self, _: usize) -> String {
        "image".into()
    }

    fn label(&self, _: usize) -> usize {
        0
    }

    fn size(&self, _: usize) -> Result<(usize, usize)> {
        Ok((self.0.height, self.0.width))
    }

    fn load(&self, _: usize, _: usize) -> Result<Image> {
        Ok(self.0.clone())
    }
}

/// Height and width of the image.
const SIZE: (usize, usize) = (375, 500);

fn photo() -> One {
    let (height, width) = SIZE;
    let pixels = (0..height * width * 3).map(|i| (i * 31 % 251) as u8).collect();
    One(Image { height, width, channels: 3, pixels })
}

/// All of it at a resolution.
fn planned(recipe: &Recipe, resolution: f64) -> PlannedImage {
    let target = target(&recipe.resolution, 16, Limits::NONE, SIZE, resolution);
    let kept = target.grid.patches();
    let frame = Frame::Whole;
    PlannedImage {
        sample: 0,
        epoch: 0,
        seen: 0,
        size: SIZE,
        frame,
        target,
        kept,
        tokens: kept,
        fitted: false,
    }
}

/// Resized to 224, and what training does to the pixels, drawn anew for every image.
fn augment(c: &mut Criterion) {
    let mut group = c.benchmark_group("augment");
    group.throughput(Throughput::Elements(1));
    let source = photo();
    for (name, sets) in [
        ("none", &[][..]),
        ("three-augment", &["augment.three_augment=true"]),
        ("color-jitter-0.3", &["augment.color_jitter=0.3"]),
        ("rand-m9-mstd0.5-inc1", &["augment.rand_augment='rand-m9-mstd0.5-inc1'"]),
    ] {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        let recipe = Recipe::load("photos", &sets).expect("a valid recipe");
        let mut viewer = Viewer::new(&source, ViewSettings::train(&recipe));
        let mut image = planned(&recipe, 224.0);
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| {
                image.epoch += 1;
                black_box(viewer.view(&image).expect("pixels"))
            });
        });
    }
}

/// Resized, flipped and cut.
fn patchify(c: &mut Criterion) {
    let mut group = c.benchmark_group("patchify");
    group.throughput(Throughput::Elements(1));
    let recipe = Recipe::default();
    let source = photo();
    let mut viewer = Viewer::new(&source, ViewSettings::train(&recipe));
    let patchifier = Patchifier::new(16, 3);
    for resolution in [64.0, 128.0, 256.0] {
        let image = planned(&recipe, resolution);
        let kept: Vec<u32> = (0..image.kept as u32).collect();
        let mut rows = vec![0; kept.len() * patchifier.patch_dim()];
        group.bench_function(BenchmarkId::from_parameter(resolution), |b| {
            b.iter(|| {
                let pixels = viewer.view(&image).expect("pixels");
                patchifier.write(&pixels, &image.target, &kept, black_box(&mut rows)).expect("patches");
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(std::time::Duration::from_secs(1))
        .warm_up_time(std::time::Duration::from_millis(300)).sample_size(20);
    targets = plan, augment, patchify
}
criterion_main!(benches);
