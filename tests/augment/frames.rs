//! Which part of an image is seen: pixels and places.

use safetensors::SafeTensors;
use trencadis::data::augment::AugmentSettings;
use trencadis::data::draw::Draw;
use trencadis::data::frame::{Frame, Framing, PixelBox};
use trencadis::data::packing::{PackingSettings, PlannedImage};
use trencadis::data::resolution::{Grid, Target};
use trencadis::data::source::Image;
use trencadis::data::view::{ViewSettings, Viewer};
use trencadis::recipe::{AspectKind, CropKind, DropKind, Recipe, RemainderKind, ResolutionKind};
use trencadis::rng::{Purpose, Stream};

use super::support::one::One;
use super::{goldens, image, numbers};

fn view(source: &One, frame: Frame, height: usize, width: usize) -> Image {
    let target = Target { grid: Grid { rows: 1, cols: 1 }, height, width, downscaled: false };
    let settings = ViewSettings {
        seed: 0,
        channels: source.0.channels,
        flip: false,
        augment: AugmentSettings::default(),
        on_device: false,
    };
    let planned = PlannedImage {
        sample: 0,
        epoch: 0,
        seen: 0,
        size: (source.0.height, source.0.width),
        frame,
        target,
        kept: 1,
        tokens: 1,
        fitted: false,
    };
    Viewer::new(source, settings).view(&planned).unwrap()
}

fn square(side: usize) -> Target {
    Target { grid: Grid { rows: 1, cols: 1 }, height: side, width: side, downscaled: false }
}

/// Resizing agrees with Pillow within 1/255; where pixels are taken from, exactly.
#[test]
fn crops_give_the_pixels_of_the_reference() {
    let bytes = goldens();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let source = One(image(&tensors, "rgb"));
    let size = (source.0.height, source.0.width);
    let mut seen = 0;
    for name in tensors.names() {
        let Some((kind, rest)) = name.strip_prefix("rgb/").and_then(|name| name.split_once('/')) else {
            continue;
        };
        let n: Vec<f64> = rest.split(',').map(|number| number.parse().unwrap()).collect();
        let whole = |i: usize| n[i] as usize;
        let want = image(&tensors, name);
        let frame = match kind {
            "box" => {
                Frame::Box(PixelBox { top: whole(0), left: whole(1), height: whole(2), width: whole(3) })
            }
            "cut" => {
                Frame::Cut { height: whole(0), width: whole(1), top: n[2] as isize, left: n[3] as isize }
            }
            "center" => {
                let stream = Stream::new(0, 0, 0, Purpose::Crop);
                Framing::Center { ratio: n[1] }.frame(stream, size, |_| square(whole(0))).0
            }
            _ => continue,
        };
        let got = view(&source, frame, want.height, want.width);
        let worst = got.pixels.iter().zip(&want.pixels).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= 1, "{name}: {worst}");
        seen += 1;
    }
    assert_eq!(seen, 9);
}

/// Of images of any size that are enlarged, every place that a square may be cut from shows what the whole image, resized,
/// has there: also where the middles of pixels before and after resizing coincide.
#[test]
fn a_cut_shows_the_same_as_the_whole_image() {
    for (channels, short) in [(1, 16), (3, 16), (1, 64), (1, 7)] {
        for long in short..short + 24 {
            let pixels = (0..short * long * channels).map(|i| (i * i * 31 % 251) as u8).collect();
            let source = One(Image { height: short, width: long, channels, pixels });
            let (height, width) = (3 * short, 3 * long);
            let whole = view(&source, Frame::Whole, height, width);
            for left in [0, 1, 4, (width - height) / 2, width - height] {
                let frame = Frame::Cut { height, width, top: 0, left: left as isize };
                let cut = view(&source, frame, height, height);
                let rows = whole.pixels.chunks_exact(width * channels);
                // What lies beyond the right edge is mirrored.
                let inside = height.min(width - left);
                let wants = rows.map(|row| &row[left * channels..][..inside * channels]);
                for (got, want) in cut.pixels.chunks_exact(height * channels).zip(wants) {
                    let off = |(a, b): (&u8, &u8)| a.abs_diff(*b);
                    assert!(got.iter().zip(want).map(off).max() <= Some(1), "{short}x{long} from {left}");
                }
            }
        }
    }
}

/// The drop rate follows the length of what is seen, not that of the whole image.
#[test]
fn rates_follow_the_crop() {
    let mut recipe = Recipe::default();
    recipe.augment.crop = CropKind::RandomResized;
    recipe.augment.scale = [0.08, 0.1];
    (recipe.resolution.kind, recipe.resolution.min, recipe.resolution.max) = (ResolutionKind::Native, 8, 128);
    recipe.model.patch = 4;
    (recipe.drop.kind, recipe.drop.min, recipe.drop.max) = (DropKind::Resolution, 0.1, 0.5);
    for image in frames(&recipe, (128, 128), 50) {
        let patches = image.target.grid.patches();
        let dropped = 1.0 - image.kept as f64 / patches as f64;
        assert!((60..150).contains(&patches) && dropped < 0.2, "{patches} patches, {dropped} dropped");
    }
}

/// A panorama is resized only where it is seen, and shows the same.
#[test]
fn what_is_not_seen_is_not_resized() {
    let pixels: Vec<u8> = (0..40 * 30_000).map(|i: usize| (i % 30_000 / 120) as u8).collect();
    let source = One(Image { height: 40, width: 30_000, channels: 1, pixels });
    let frame = Frame::Cut { height: 1000, width: 750_000, top: -4, left: 375_000 };
    let got = view(&source, frame, 1000, 1000);
    assert!(got.pixels.iter().all(|&value| value == 125));
}

fn recipe(crop: CropKind) -> Recipe {
    let mut recipe = Recipe::default();
    recipe.augment.crop = crop;
    recipe.model.patch = 16;
    (recipe.resolution.kind, recipe.resolution.max) = (ResolutionKind::Fixed, 96);
    recipe.resolution.aspect = AspectKind::Square;
    recipe.resolution.remainder = RemainderKind::Drop;
    recipe
}

/// The places that each draw of an epoch sees of an image.
fn frames(recipe: &Recipe, size: (usize, usize), draws: u64) -> Vec<PlannedImage> {
    let settings = PackingSettings::train(recipe).unwrap();
    (0..draws).map(|sample| settings.plan(Draw { epoch: 0, sample, seen: 0 }, size)).collect()
}

#[test]
fn random_resized_crops_are_distributed_as_torchvisions() {
    let bytes = goldens();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (height, width) in [(300, 400), (224, 224), (90, 400)] {
        let mut figures: [Vec<f64>; 4] = Default::default();
        for planned in frames(&recipe(CropKind::RandomResized), (height, width), 40_000) {
            let Frame::Box(PixelBox { top, left, height: h, width: w }) = planned.frame else { panic!() };
            assert!(top + h <= height && left + w <= width && h > 0 && w > 0);
            let [full_height, full_width, top, left, h, w] =
                [height, width, top, left, h, w].map(|n| n as f64);
            figures[0].push(h * w / (full_height * full_width));
            figures[1].push((w / h).ln());
            figures[2].push((top + h / 2.0) / full_height);
            figures[3].push((left + w / 2.0) / full_width);
        }
        let want = numbers(&tensors, &format!("crops/{height},{width}"));
        for (figure, (values, want)) in figures.iter_mut().zip(want.chunks(9)).enumerate() {
            values.sort_by(f64::total_cmp);
            for (decile, want) in (1..).zip(want) {
                let got = values[values.len() * decile / 10];
                assert!((got - want).abs() < 0.02, "{height}x{width}, figure {figure}: {got} for {want}");
            }
        }
    }
}

#[test]
fn where_no_shape_fits_the_middle_is_taken() {
    let bytes = goldens();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let boxes: Vec<i64> = {
        let tensor = tensors.tensor("boxes").unwrap();
        tensor.data().as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()
    };
    let mut recipe = recipe(CropKind::RandomResized);
    recipe.augment.scale = [0.9, 1.0];
    for numbers in boxes.chunks(6) {
        let n: Vec<usize> = numbers.iter().map(|&number| number as usize).collect();
        let want = Frame::Box(PixelBox { top: n[2], left: n[3], height: n[4], width: n[5] });
        assert_eq!(frames(&recipe, (n[0], n[1]), 1)[0].frame, want);
    }
}

#[test]
fn a_crop_at_native_aspect_has_the_grid_of_its_own_shape() {
    let mut recipe = recipe(CropKind::RandomResized);
    recipe.resolution.aspect = AspectKind::Native;
    recipe.resolution.remainder = RemainderKind::Round;
    let mut shapes = std::collections::BTreeSet::new();
    for planned in frames(&recipe, (100, 300), 500) {
        let Frame::Box(area) = planned.frame else { panic!() };
        let ratio = area.width as f64 / area.height as f64;
        let side = |pixels: f64| (pixels / 16.0).round() as usize;
        let want = Grid { rows: side(96.0 / ratio.sqrt()), cols: side(96.0 * ratio.sqrt()) };
        assert_eq!(planned.target.grid, want, "{area:?}");
        assert_eq!(planned.tokens, planned.kept);
        shapes.insert((want.rows, want.cols));
    }
    assert!(shapes.len() >= 3, "{shapes:?}");
}

#[test]
fn simple_crops_lie_anywhere_and_are_square() {
    let (mut tops, mut lefts) = ([0; 9], std::collections::BTreeMap::new());
    for planned in frames(&recipe(CropKind::Simple), (250, 400), 9000) {
        let Frame::Cut { height, width, top, left } = planned.frame else { panic!() };
        assert_eq!((height, width), (96, 153), "96 * 400 / 250 = 153.6, rounded down");
        assert_eq!((planned.target.height, planned.target.width, planned.kept), (96, 96, 36));
        tops[(top + 4) as usize] += 1;
        *lefts.entry(left).or_insert(0) += 1;
    }
    assert!(tops.iter().all(|&count| (850..1150).contains(&count)), "{tops:?}");
    assert_eq!((lefts.keys().min(), lefts.keys().max(), lefts.len()), (Some(&-4), Some(&61), 66));
    // 160 pixels of patch 14: eleven patches a side, the remainder cut off, as in DeiT III's H/14.
    let mut recipe = recipe(CropKind::Simple);
    (recipe.model.patch, recipe.resolution.max) = (14, 160);
    let planned = frames(&recipe, (250, 400), 1).remove(0);
    assert_eq!((planned.target.height, planned.kept), (160, 121));
}

#[test]
fn evaluation_cuts_the_middle_or_sees_everything() {
    let mut recipe = recipe(CropKind::Simple);
    let frame =
        |recipe: &Recipe| PackingSettings::eval(recipe, 0).unwrap().plan(Draw::default(), (250, 400)).frame;
    assert_eq!(frame(&recipe), Frame::Whole);
    recipe.eval.crop = 0.875;
    // int(96 / 0.875) = 109, and 109 * 400 / 250 = 174.4.
    assert_eq!(frame(&recipe), Frame::Cut { height: 109, width: 174, top: 6, left: 39 });
    recipe.eval.crop = 1.0;
    assert_eq!(frame(&recipe), Frame::Cut { height: 96, width: 153, top: 0, left: 28 });
}

#[test]
fn what_is_seen_is_told_in_the_images_pixels() {
    let target = square(96);
    let cut = Frame::Cut { height: 125, width: 200, top: -4, left: 100 };
    assert_eq!(cut.seen((250, 400), &target), [-8.0, 200.0, 192.0, 192.0]);
    assert_eq!(Frame::Whole.seen((250, 400), &target), [0.0, 0.0, 250.0, 400.0]);
    let area = PixelBox { top: 1, left: 2, height: 3, width: 4 };
    assert_eq!(Frame::Box(area).seen((250, 400), &target), [1.0, 2.0, 3.0, 4.0]);
}
