//! From a planned image to pixels, and from pixels to rows.

use trencadis::data::augment::AugmentSettings;
use trencadis::data::frame::Frame;
use trencadis::data::packing::PlannedImage;
use trencadis::data::patchify::Patchifier;
use trencadis::data::resolution::{Grid, Target};
use trencadis::data::source::Image;
use trencadis::data::view::{ViewSettings, Viewer};

use super::support::one::One;

fn planned(epoch: u64, grid: (usize, usize), height: usize, width: usize) -> PlannedImage {
    let grid = Grid { rows: grid.0, cols: grid.1 };
    let target = Target { grid, height, width, downscaled: false };
    PlannedImage {
        sample: 0,
        epoch,
        seen: 0,
        size: (height, width),
        frame: Frame::Whole,
        target,
        kept: grid.patches(),
        tokens: grid.patches(),
        fitted: false,
    }
}

/// The pixels of the planned image, mirrored in some epochs where `flip` is set.
fn view(image: &Image, planned: &PlannedImage, flip: bool) -> Image {
    let source = One(image.clone());
    let augment = AugmentSettings::default();
    let settings = ViewSettings { seed: 7, channels: image.channels, flip, augment, on_device: false };
    Viewer::new(&source, settings).view(planned).unwrap()
}

/// The rows of the patches `kept`.
fn rows(image: &Image, planned: &PlannedImage, patch: usize, kept: &[u32]) -> Vec<u8> {
    let patchifier = Patchifier::new(patch, image.channels);
    let mut rows = vec![9; kept.len() * patchifier.patch_dim()];
    patchifier.write(&view(image, planned, false), &planned.target, kept, &mut rows).unwrap();
    rows
}

#[test]
fn patches_are_cut() {
    let image = Image { height: 6, width: 9, channels: 1, pixels: (0..6 * 9).collect() };
    let whole = planned(0, (3, 4), 6, 9);
    assert_eq!(rows(&image, &whole, 2, &[1, 11]), [2, 3, 11, 12, 42, 43, 51, 52]);
    let image = Image { height: 2, width: 4, channels: 3, pixels: (0..24).collect() };
    assert_eq!(
        rows(&image, &planned(0, (1, 2), 2, 4), 2, &[1]),
        [6, 9, 18, 21, 7, 10, 19, 22, 8, 11, 20, 23]
    );
}

#[test]
fn images_are_mirrored_in_half_of_the_epochs() {
    for channels in [1, 3] {
        let pixels: Vec<u8> = (0..6 * 9 * channels as u8).collect();
        let image = Image { height: 6, width: 9, channels, pixels: pixels.clone() };
        let mirrored: Vec<u8> = (0..6)
            .flat_map(|y| (0..9).rev().map(move |x| (y * 9 + x) * channels))
            .flat_map(|at| (at..at + channels).map(|i| i as u8))
            .collect();
        let mut flipped = 0;
        for epoch in 0..200 {
            let plan = planned(epoch, (3, 4), 6, 9);
            assert_eq!(view(&image, &plan, false).pixels, pixels);
            let seen = view(&image, &plan, true).pixels;
            assert!(seen == pixels || seen == mirrored);
            flipped += usize::from(seen == mirrored);
        }
        assert!((70..130).contains(&flipped), "{flipped} of 200");
    }
}

#[test]
fn images_are_resized() {
    let grey = Image { height: 30, width: 50, channels: 3, pixels: vec![77; 4500] };
    assert_eq!(rows(&grey, &planned(0, (2, 2), 4, 4), 2, &[0, 3]), [77; 24], "resizing keeps a constant");
    // A black half and a white half: antialiasing leaves both plain far from the edge.
    let halves = (0..32 * 64).map(|i| if i % 64 < 32 { 0 } else { 255 }).collect();
    let image = Image { height: 32, width: 64, channels: 1, pixels: halves };
    let rows = rows(&image, &planned(0, (1, 4), 2, 8), 2, &[0, 1, 2, 3]);
    assert_eq!((rows[0], rows[15]), (0, 255));
}

#[test]
fn what_does_not_fit_is_named() {
    let image = Image { height: 2, width: 2, channels: 1, pixels: vec![0; 4] };
    let plan = planned(0, (1, 1), 2, 2);
    let source = One(image.clone());
    let augment = AugmentSettings::default();
    let settings = ViewSettings { seed: 0, channels: 3, flip: false, augment, on_device: false };
    let error = Viewer::new(&source, settings).view(&plan).unwrap_err().to_string();
    assert!(error.contains("the image") && error.contains("1 channels where 3"), "{error}");
    assert!(Patchifier::new(2, 3).write(&image, &plan.target, &[0], &mut [0; 12]).is_err());
    let larger = planned(0, (2, 2), 4, 4);
    assert!(Patchifier::new(2, 1).write(&image, &larger.target, &[0], &mut [0; 4]).is_err());
}
