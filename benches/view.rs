//! What the host does for an image with `data.views` on the host and on the device, on one thread; and the kernels that
//! then make its patches.

use std::hint::black_box;
use std::io::Cursor;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use image::ImageFormat;
use trencadis::Result;
use trencadis::data::frame::Frame;
use trencadis::data::packing::PlannedImage;
use trencadis::data::patchify::Patchifier;
use trencadis::data::resolution::{Limits, target};
use trencadis::data::source::{Image, Source, decode};
use trencadis::data::view::{ViewSettings, Viewer};
use trencadis::kernels::view::Shares;
use trencadis::recipe::Recipe;

mod common;

/// One photograph of 500x375 pixels: a file, or decoded and kept.
enum Photo {
    File(Vec<u8>),
    Kept(Image),
}

impl Source for Photo {
    fn len(&self) -> usize {
        1
    }

    fn name(&self, _: usize) -> String {
        "photo".into()
    }

    fn label(&self, _: usize) -> usize {
        0
    }

    fn size(&self, _: usize) -> Result<(usize, usize)> {
        Ok((HEIGHT, WIDTH))
    }

    fn load(&self, _: usize, channels: usize) -> Result<Image> {
        match self {
            Self::File(bytes) => decode::decode(bytes, "photo", channels),
            Self::Kept(image) => Ok(image.clone()),
        }
    }
}

const HEIGHT: usize = 375;
const WIDTH: usize = 500;

/// Smooth shapes and some noise, about as hard to compress as a photograph.
fn photos() -> [(&'static str, Photo); 2] {
    let noise = common::random(HEIGHT * WIDTH * 3);
    let value = |(i, noise): (usize, &f32)| {
        let (x, y) = ((i / 3 % WIDTH) as f32, (i / 3 / WIDTH) as f32);
        (128.0 + 70.0 * (x / 37.0).sin() * (y / 23.0 + i as f32 % 3.0).cos() + 8.0 * noise) as u8
    };
    let pixels: Vec<u8> = noise.iter().enumerate().map(value).collect();
    let mut file = Cursor::new(Vec::new());
    let rgb = image::RgbImage::from_raw(WIDTH as u32, HEIGHT as u32, pixels.clone()).expect("as many pixels");
    rgb.write_to(&mut file, ImageFormat::Jpeg).expect("a JPEG");
    let kept = Image { height: HEIGHT, width: WIDTH, channels: 3, pixels };
    [("jpeg", Photo::File(file.into_inner())), ("kept", Photo::Kept(kept))]
}

/// All of it at 224 pixels, mirrored now and then, in other colours or not.
fn host(c: &mut Criterion) {
    let mut group = c.benchmark_group("view");
    group.throughput(Throughput::Elements(1));
    for (colours, jitter) in [("plain", 0.0), ("color-jitter", 0.3)] {
        let mut recipe = Recipe::default();
        recipe.augment.color_jitter = jitter;
        let side = recipe.model.patch;
        let target = target(&recipe.resolution, side, Limits::NONE, (HEIGHT, WIDTH), 224.0);
        let tokens = target.grid.patches();
        let kept: Vec<u32> = (0..tokens as u32).collect();
        let mut planned = PlannedImage {
            sample: 0,
            epoch: 0,
            seen: 0,
            size: (HEIGHT, WIDTH),
            frame: Frame::Whole,
            target,
            kept: tokens,
            tokens,
            fitted: false,
        };
        let patchifier = Patchifier::new(side, 3);
        let room = Shares::of_token(side, 3, false).of(tokens);
        let mut memory = vec![0; room.bytes];
        for (name, photo) in &photos() {
            let mut viewer = Viewer::new(photo, ViewSettings::train(&recipe));
            group.bench_function(BenchmarkId::new(format!("host-{name}"), colours), |b| {
                b.iter(|| {
                    planned.epoch += 1;
                    let pixels = viewer.view(&planned).expect("pixels");
                    let rows = &mut memory[..tokens * patchifier.patch_dim()];
                    patchifier.write(&pixels, &planned.target, &kept, black_box(rows)).expect("patches");
                });
            });
            group.bench_function(BenchmarkId::new(format!("device-{name}"), colours), |b| {
                b.iter(|| {
                    planned.epoch += 1;
                    let picture = viewer.picture(&planned, room).expect("a picture").expect("room");
                    // As it goes to pinned memory.
                    black_box(&mut memory[..picture.bytes().len()]).copy_from_slice(picture.bytes());
                });
            });
        }
    }
}

fn view_gpu(c: &mut Criterion) {
    common::gpu::family(c, "view", common::view::cases);
}

criterion_group!(benches, host, view_gpu);
criterion_main!(benches);
