//! Image sources on real files that the tests write: decoding, layouts, splits and what each
//! mistake is answered with.

mod arrays;
mod decoding;
mod folders;
mod tars;

use std::fs;
use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, GrayImage, ImageFormat, RgbImage};
use trencadis::Error;
use trencadis::data::source::{Dataset, Source, open};
use trencadis::recipe::{DataConfig, SourceKind};

/// The configuration for `path` with `auto`, or the given kind.
fn config(path: impl AsRef<Path>) -> DataConfig {
    DataConfig { path: path.as_ref().display().to_string(), ..DataConfig::default() }
}

fn config_of(kind: SourceKind, path: impl AsRef<Path>) -> DataConfig {
    DataConfig { source: kind, ..config(path) }
}

fn open_auto(path: impl AsRef<Path>) -> Dataset {
    open(&config(path), 3, 0).unwrap()
}

/// The sentence of a failure, which must be the user's to mend (exit code 2) and hold every part.
#[track_caller]
fn assert_refused<T>(result: Result<T, Error>, parts: &[&str]) {
    let error = result.err().expect("this must be refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    let sentence = error.to_string();
    for part in parts {
        assert!(sentence.contains(part), "`{part}` is missing in: {sentence}");
    }
}

fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A picture in which every pixel differs from its neighbours.
fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| image::Rgb([(40 * x) as u8, (30 * y) as u8, (x * y) as u8]))
}

/// A PNG of one grey value, which tells images apart after loading.
fn grey_png(value: u8) -> Vec<u8> {
    encode(&DynamicImage::from(GrayImage::from_pixel(3, 2, image::Luma([value]))), ImageFormat::Png)
}

fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// (label, first pixel) of every sample: who is where.
fn samples(source: &dyn Source) -> Vec<(usize, u8)> {
    (0..source.len()).map(|i| (source.label(i), source.load(i, 1).unwrap().pixels[0])).collect()
}

fn names(source: &dyn Source) -> Vec<String> {
    (0..source.len()).map(|i| source.name(i)).collect()
}

/// Samples a class.
fn counts(source: &dyn Source, classes: usize) -> Vec<usize> {
    let mut counts = vec![0; classes];
    (0..source.len()).for_each(|i| counts[source.label(i)] += 1);
    counts
}
