//! Single pictures: every way of framing, every operation, sizes that fit nothing.

use std::sync::Arc;

use half::bf16;
use rand::Rng;
use trencadis::data::augment::AugmentSettings;
use trencadis::data::batch::Pictures;
use trencadis::data::frame::{Frame, PixelBox};
use trencadis::data::packing::PlannedImage;
use trencadis::data::patchify::Patchifier;
use trencadis::data::resolution::{Grid, Target};
use trencadis::data::source::Image;
use trencadis::data::view::{ViewSettings, Viewer};
use trencadis::kernels::view::{Axis, Op, Picture, Shares, Source, Views};
use trencadis::recipe::Recipe;
use trencadis::rng::{Purpose, Stream};

use crate::support::devices::devices;
use crate::support::one::One;
use crate::{launch, patches};

const ROOM: Shares = Shares { bytes: 1 << 30, pixels: 1 << 30 };

/// Pixels of every value, with steep edges and flat parts: what overshoots is cut off.
fn image(height: usize, width: usize, channels: usize) -> Image {
    let mut pixels = vec![0; height * width * channels];
    Stream::new(height as u64, width as u64, channels as u64, Purpose::Augment).fill_bytes(&mut pixels);
    for (i, value) in pixels.iter_mut().enumerate() {
        match (i / channels % width / 5 + i / channels / width / 7) % 3 {
            0 => *value = 255,
            1 => *value /= 16,
            _ => {}
        }
    }
    Image { height, width, channels, pixels }
}

fn planned(image: &Image, frame: Frame, target: (usize, usize), side: usize, epoch: u64) -> PlannedImage {
    let grid = Grid { rows: target.0 / side, cols: target.1 / side };
    PlannedImage {
        sample: 0,
        epoch,
        seen: 0,
        size: (image.height, image.width),
        frame,
        target: Target { grid, height: target.0, width: target.1, downscaled: false },
        kept: grid.patches(),
        tokens: grid.patches(),
        fitted: false,
    }
}

/// Pictures one after another with all their patches, and what these are.
struct Batch {
    pictures: Pictures,
    want: Vec<u8>,
    side: usize,
}

impl Batch {
    fn new(side: usize, channels: usize) -> Self {
        let shape = Views { tokens: 0, channels, side, pictures: 1, bytes: 0, pixels: 0 };
        Self {
            pictures: Pictures { pictures: Arc::default(), rows: Vec::new(), shape },
            want: Vec::new(),
            side,
        }
    }

    /// Whether the device does all of it.
    fn add(&mut self, image: &Image, plan: &PlannedImage, settings: &ViewSettings) -> bool {
        let source = One(image.clone());
        let mut viewer = Viewer::new(&source, settings.clone());
        let picture = viewer.picture(plan, ROOM).unwrap().expect("room");
        let all: Vec<u32> = (0..plan.kept as u32).collect();
        let patchifier = Patchifier::new(self.side, image.channels);
        let mut rows = vec![0; plan.kept * patchifier.patch_dim()];
        let pixels = viewer.view(plan).unwrap();
        patchifier.write(&pixels, &plan.target, &all, &mut rows).unwrap();
        self.want.extend(rows);
        let number = self.pictures.pictures.len() as i32 + 1;
        for patch in 0..plan.kept {
            let (row, column) = (patch / plan.target.grid.cols, patch % plan.target.grid.cols);
            self.pictures.rows.push([number, (row * self.side) as i32, (column * self.side) as i32]);
        }
        let finished = Axis::copied(0..plan.target.height);
        let across = Axis::copied(0..plan.target.width);
        let source = Source { pixels: &pixels.pixels, width: pixels.width, channels: pixels.channels };
        let on_device = Some(&picture) != Picture::new(source, &finished, &across, &[], ROOM).as_ref();
        Arc::make_mut(&mut self.pictures.pictures).push(picture);
        on_device
    }

    #[track_caller]
    fn check(mut self) {
        let Pictures { pictures, rows, shape } = &mut self.pictures;
        let bytes = pictures.iter().map(|picture| picture.bytes().len()).sum();
        let (count, pixels) = (pictures.len(), self.want.len() + 4096 * pictures.len());
        *shape = Views { tokens: rows.len(), pictures: count, bytes, pixels, ..*shape };
        for device in devices() {
            let got = patches(&device, &self.pictures);
            let width = shape_width(&self.pictures.shape);
            for (t, (got, want)) in got.chunks(width).zip(self.want.chunks(width)).enumerate() {
                assert!(got == want, "{:?}: {got:?} instead of {want:?}", self.pictures.rows[t]);
            }
        }
    }
}

fn shape_width(shape: &Views) -> usize {
    shape.channels * shape.side * shape.side
}

fn settings(channels: usize, flip: bool) -> ViewSettings {
    ViewSettings { seed: 7, channels, flip, augment: AugmentSettings::default(), on_device: true }
}

#[test]
fn resized_pixels_are_those_of_the_host() {
    for channels in [1, 3] {
        let (mut batch, mut on_device) = (Batch::new(8, channels), 0);
        let boxed = |top, left, height, width| Frame::Box(PixelBox { top, left, height, width });
        let cut = |height, width, top, left| Frame::Cut { height, width, top, left };
        for (source, frame, target) in [
            ((40, 64), Frame::Whole, (40, 64)),
            ((37, 53), Frame::Whole, (16, 24)),
            ((100, 150), Frame::Whole, (32, 16)),
            ((9, 7), Frame::Whole, (24, 40)),
            ((16, 50), Frame::Whole, (16, 24)),
            ((50, 16), Frame::Whole, (24, 16)),
            ((1, 1), Frame::Whole, (8, 8)),
            ((3, 300), Frame::Whole, (8, 8)),
            // The target is no multiple of the patch.
            ((37, 53), Frame::Whole, (20, 31)),
            ((90, 80), boxed(11, 7, 60, 33), (24, 16)),
            ((90, 80), boxed(80, 72, 10, 8), (16, 24)),
            ((90, 80), boxed(50, 3, 16, 24), (16, 24)),
            // Mirrored at edges, above and below, on the left and the right, and the middle of the longer side.
            ((61, 97), cut(24, 38, -4, -4), (24, 24)),
            ((61, 97), cut(24, 38, 4, 18), (24, 24)),
            ((24, 24), cut(24, 24, 3, -2), (24, 24)),
            ((97, 61), cut(38, 24, 7, 0), (24, 24)),
            ((24, 60), cut(24, 60, 0, 19), (24, 24)),
            ((12, 400), cut(8, 266, 0, 129), (8, 8)),
        ] {
            let image = image(source.0, source.1, channels);
            for epoch in 0..4 {
                let plan = planned(&image, frame, target, 8, epoch);
                on_device += usize::from(batch.add(&image, &plan, &settings(channels, true)));
            }
        }
        // Two of them are copies where they are not mirrored.
        assert!((64..72).contains(&on_device), "{on_device} pictures are resized by the device");
        batch.check();
    }
}

#[test]
fn patches_of_every_side() {
    for (channels, side) in [(3, 7), (3, 14), (1, 1), (1, 5), (3, 20)] {
        let mut batch = Batch::new(side, channels);
        let image = image(43, 59, channels);
        batch.add(
            &image,
            &planned(&image, Frame::Whole, (2 * side, 3 * side), side, 0),
            &settings(channels, false),
        );
        batch.check();
    }
}

#[test]
fn colours_are_those_of_the_host() {
    for (name, sets, most) in [
        ("colour jitter", &["augment.color_jitter=0.9"][..], 24),
        ("3-augment and jitter", &["augment.three_augment=true", "augment.color_jitter=0.4"], 16),
        ("RandAugment", &["augment.rand_augment='rand-m9-mstd0.5-inc1'"], 80),
    ] {
        for channels in [1, 3] {
            let mut sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
            sets.push(format!("model.channels={channels}"));
            if channels == 1 {
                sets.extend(["data.mean=[0.4]".into(), "data.std=[0.3]".into()]);
            }
            let recipe = Recipe::load("photos", &sets).unwrap();
            let settings = ViewSettings { on_device: true, ..ViewSettings::train(&recipe) };
            let mut batch = Batch::new(8, channels);
            let mut on_device = 0;
            for epoch in 0..most {
                // No whole fours of pixels.
                let image = image(31, 17 + epoch as usize % 9, channels);
                let plan = planned(&image, Frame::Whole, (19, 25), 8, epoch);
                on_device += u64::from(batch.add(&image, &plan, &settings));
            }
            assert!(on_device > most / 4, "{name}: {on_device} of {most} are the device's");
            batch.check();
        }
    }
}

/// Every pixel value, by every operation alone and behind others.
#[test]
fn operations_cover_all_values() {
    let pixels: Vec<u8> = (0..=255).flat_map(|x: u8| [x, x.wrapping_mul(7), 255 - x]).collect();
    let image = Image { height: 16, width: 16, channels: 3, pixels };
    let (rows, columns) = (Axis::copied(0..16), Axis::copied(0..16));
    let source = Source { pixels: &image.pixels, width: 16, channels: 3 };
    let lists: [&[Op]; 6] = [
        &[Op::BlendBlack(1.7)],
        &[Op::BlendMean(0.3), Op::BlendMean(1.9)],
        &[Op::BlendLuma(0.0)],
        &[Op::Solarize(128), Op::Mask(0xf0), Op::Add(100)],
        &[Op::Solarize(0), Op::BlendLuma(1.4), Op::BlendMean(1.3), Op::BlendBlack(0.1)],
        &[Op::Mask(0)],
    ];
    let all = lists.map(|ops| Picture::new(source, &rows, &columns, ops, ROOM).unwrap());
    let shape = Views { tokens: 6, channels: 3, side: 16, pictures: 6, bytes: 1 << 14, pixels: 1 << 13 };
    let pictures = Pictures {
        pictures: all.to_vec().into(),
        rows: (1..=6).map(|number| [number, 0, 0]).collect(),
        shape,
    };
    let plane = |row: &[u8], at: usize| [row[at], row[256 + at], row[512 + at]];
    for device in devices() {
        let got = patches(&device, &pictures);
        let rows: Vec<&[u8]> = got.chunks(768).collect();
        for at in 0..256 {
            let x: [u8; 3] = image.pixels[3 * at..3 * at + 3].try_into().unwrap();
            let luma =
                (19595 * u32::from(x[0]) + 38470 * u32::from(x[1]) + 7471 * u32::from(x[2]) + 0x8000) >> 16;
            assert_eq!(plane(rows[0], at), x.map(|x| (1.7f32 * f32::from(x)) as u8));
            assert_eq!(plane(rows[2], at), [luma as u8; 3]);
            let third = |x: u8| {
                let x = if x < 128 { x } else { 255 - x } & 0xf0;
                if x < 128 { x.saturating_add(100) } else { x }
            };
            assert_eq!(plane(rows[3], at), x.map(third));
            assert_eq!(plane(rows[5], at), [0; 3]);
        }
        let spread = |row: &[u8]| row.iter().max().unwrap() - row.iter().min().unwrap();
        assert!(spread(rows[1]) > 60 && spread(rows[4]) > 10, "{} {}", spread(rows[1]), spread(rows[4]));
    }
}

#[test]
fn rows_without_a_patch_are_zeros_and_others_are_normalised() {
    let image = image(20, 20, 3);
    let axis = Axis::new(20, 0.0, 20.0, 16);
    let source = Source { pixels: &image.pixels, width: 20, channels: 3 };
    let picture = Picture::new(source, &axis, &axis, &[], ROOM).unwrap();
    let shape = Views { tokens: 4, channels: 3, side: 8, pictures: 3, bytes: 1 << 13, pixels: 1 << 12 };
    let rows = vec![[0; 3], [1, 8, 0], [0; 3], [1, 0, 8]];
    let pictures = Pictures { pictures: vec![picture].into(), rows, shape };
    for device in devices() {
        let stream = device.stream().unwrap();
        let plain = launch(&device, &stream, &pictures, &[1.0, 0.0].repeat(3)).unwrap();
        let factors = [0.5, -1.0, 0.25, 2.0, 0.125, -3.0];
        let scaled = launch(&device, &stream, &pictures, &factors).unwrap();
        for (i, (plain, scaled)) in plain.iter().zip(&scaled).enumerate() {
            let (row, channel) = (i / 192, i % 192 / 64);
            let want = plain.to_f32().mul_add(factors[2 * channel], factors[2 * channel + 1]);
            let want = if row % 2 == 0 { bf16::ZERO } else { bf16::from_f32(want) };
            assert_eq!(scaled.to_bits(), want.to_bits(), "row {row}");
        }
    }
}

#[test]
fn what_leads_outside_is_refused() {
    let image = image(20, 20, 3);
    let axis = Axis::new(20, 0.0, 20.0, 16);
    let source = Source { pixels: &image.pixels, width: 20, channels: 3 };
    let picture = |target: &Axis| Picture::new(source, target, &axis, &[], ROOM).unwrap();
    let one = picture(&axis);
    let shape = Views { tokens: 2, channels: 3, side: 8, pictures: 2, bytes: 1 << 13, pixels: 1 << 12 };
    let says = |shape: Views, pictures: &[Picture], rows: &[[i32; 3]]| {
        shape.check(pictures, rows).err().map_or(String::new(), |e| e.to_string())
    };
    let rows = [[1, 0, 0], [1, 8, 8]];
    assert_eq!(says(shape, std::slice::from_ref(&one), &rows), "");
    for wrong in [[2, 0, 0], [-1, 0, 0], [1, 9, 0], [1, 0, 9], [1, -1, 0]] {
        assert!(
            says(shape, std::slice::from_ref(&one), &[rows[0], wrong]).contains("lead outside"),
            "{wrong:?}"
        );
    }
    assert!(says(shape, std::slice::from_ref(&one), &rows[..1]).contains("lead outside"));
    let grey = says(Views { channels: 1, ..shape }, std::slice::from_ref(&one), &rows);
    assert!(grey.contains("a picture of 3 channels in a batch of 1"), "{grey}");
    let half = trencadis::kernels::view::Mixed::Blend(0.5);
    let mixed = one.clone().mixed(&half);
    assert_eq!(says(shape, &[mixed.clone(), one.clone()], &rows), "");
    let smaller = picture(&Axis::new(20, 0.0, 20.0, 8));
    assert!(says(shape, &[mixed.clone(), smaller], &rows).contains("lead outside"));
    assert!(
        says(shape, &[one.clone(), mixed], &rows).contains("lead outside"),
        "the last one has no partner"
    );
    for small in [
        Views { pictures: 1, ..shape },
        Views { bytes: one.bytes().len(), ..shape },
        Views { pixels: 16 * 16 * 3, ..shape },
    ] {
        assert!(says(small, &[one.clone(), one.clone()], &rows).contains("do not fit memory made for"));
    }
    let refused = Views { channels: 4, ..shape }.supported();
    assert!(refused.unwrap_err().to_string().contains("set data.views=\"host\""));
    for device in devices().into_iter().take(1) {
        let stream = device.stream().unwrap();
        let pictures = Pictures { pictures: vec![one.clone()].into(), rows: rows.to_vec(), shape };
        let refused = launch(&device, &stream, &pictures, &[1.0; 4]);
        assert!(refused.unwrap_err().to_string().contains("factors has 4 elements"));
    }
}
