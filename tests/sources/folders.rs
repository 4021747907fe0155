//! Class folders, the automatic split, and how the kind of source is decided.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use image::{ExtendedColorType, ImageEncoder, ImageFormat};
use tempfile::{TempDir, tempdir};
use trencadis::data::source::cache::{Budget, Cached};
use trencadis::data::source::{Dataset, Source, fingerprint, open, open_for_eval};
use trencadis::recipe::{DataConfig, SourceKind};
use trencadis::rng::{Purpose, Stream};

use super::*;

/// `classes` folders with the given number of images each, in the folder `inside`.
fn make(root: &Path, inside: &str, classes: &[(&str, usize)]) {
    for (class, count) in classes {
        for i in 0..*count {
            write(root.join(inside).join(class).join(format!("{i:03}.png")), grey_png(i as u8));
        }
    }
}

fn folder(inside: &str, classes: &[(&str, usize)]) -> TempDir {
    let dir = tempdir().unwrap();
    make(dir.path(), inside, classes);
    dir
}

#[test]
fn divided_folders_keep_their_parts() {
    for validation in ["val", "validation", "test"] {
        let dir = folder("train", &[("dog", 3), ("cat", 2)]);
        make(dir.path(), validation, &[("dog", 1), ("cat", 1)]);
        let data = open_auto(dir.path());
        assert_eq!(data.classes, ["cat", "dog"]);
        assert_eq!(samples(&*data.train), [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]);
        assert_eq!(samples(&*data.validation), [(0, 0), (1, 0)]);
        assert!(data.train.name(0).ends_with("train/cat/000.png"));
    }
}

#[test]
fn validation_goes_before_test() {
    let dir = folder("train", &[("a", 2)]);
    make(dir.path(), "val", &[("a", 3)]);
    make(dir.path(), "test", &[("a", 5)]);
    assert_eq!(open_auto(dir.path()).validation.len(), 3);
}

#[test]
fn names_decide_what_is_an_image() {
    let dir = tempdir().unwrap();
    let class = dir.path().join("cat");
    write(class.join("B.PNG"), grey_png(1));
    write(class.join("a.png"), grey_png(2));
    write(class.join("deep/er/c.WebP"), encode(&picture(3, 2).into(), ImageFormat::WebP));
    write(class.join("d.JpEg"), encode(&picture(3, 2).into(), ImageFormat::Jpeg));
    write(class.join(".hidden.png"), grey_png(3));
    write(class.join(".cache/x.png"), grey_png(3));
    write(class.join("notes.txt"), "no image");
    write(dir.path().join("README.md"), "no class");
    write(dir.path().join(".git/x.png"), grey_png(3));
    let config = DataConfig { validation: 0.0, ..config(dir.path()) };
    let data = open(&config, 3, 0).unwrap();
    let expected: Vec<String> = ["B.PNG", "a.png", "d.JpEg", "deep/er/c.WebP"]
        .iter()
        .map(|n| class.join(n).display().to_string())
        .collect();
    assert_eq!(names(&*data.train), expected);
    assert!(data.validation.is_empty());
}

#[test]
fn content_counts_more_than_the_extension() {
    let dir = tempdir().unwrap();
    write(dir.path().join("cat/a.jpg"), grey_png(9));
    write(dir.path().join("cat/b.jpg"), "text");
    let data = open(&DataConfig { validation: 0.0, ..config(dir.path()) }, 1, 0).unwrap();
    assert_eq!(data.train.load(0, 1).unwrap().pixels, [9; 6]);
    assert_eq!(data.train.size(0).unwrap(), (2, 3));
    assert_refused(data.train.load(1, 1), &["cat/b.jpg", "not a JPEG, PNG or WebP"]);
    fs::remove_file(dir.path().join("cat/a.jpg")).unwrap();
    assert_refused(data.train.load(0, 1), &["cat/a.jpg", "cannot be read"]);
}

/// A header that the first 64 KiB do not hold: a JPEG behind large comments.
#[test]
fn sizes_behind_a_long_header() {
    let dir = tempdir().unwrap();
    let jpeg = encode(&picture(31, 17).into(), ImageFormat::Jpeg);
    let mut long = jpeg[..2].to_vec();
    for _ in 0..3 {
        long.extend([0xFF, 0xFE, 0xFF, 0xFF]);
        long.extend([b' '; 0xFFFD]);
    }
    long.extend(&jpeg[2..]);
    write(dir.path().join("cat/long.jpg"), &long);
    let data = open(&DataConfig { validation: 0.0, ..config(dir.path()) }, 3, 0).unwrap();
    assert_eq!(data.train.size(0).unwrap(), (17, 31));
    assert_eq!(data.train.load(0, 3).unwrap().width, 31);
}

/// WebP keeps its EXIF block behind the pixels, here beyond the first 64 KiB.
#[test]
fn sizes_agree_with_exif_wherever_it_stands() {
    let dir = tempdir().unwrap();
    let mut dice = Stream::new(0, 0, 0, Purpose::Augment);
    let noise = image::RgbImage::from_fn(200, 150, |_, _| image::Rgb([(); 3].map(|()| dice.bits() as u8)));
    let exif = b"II\x2A\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0".to_vec();
    let (mut webp, mut png) = (Vec::new(), Vec::new());
    let mut encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut webp);
    encoder.set_exif_metadata(exif.clone()).unwrap();
    encoder.write_image(noise.as_raw(), 200, 150, ExtendedColorType::Rgb8).unwrap();
    let mut encoder = image::codecs::png::PngEncoder::new(&mut png);
    encoder.set_exif_metadata(exif).unwrap();
    encoder.write_image(noise.as_raw(), 200, 150, ExtendedColorType::Rgb8).unwrap();
    assert!(webp.len() > 1 << 16);
    // Some writers forget to announce the block; without the flag a cut file looks whole.
    assert_eq!((&webp[12..16], webp[20] & 8), (&b"VP8X"[..], 8));
    webp[20] &= !8;
    write(dir.path().join("a/1.webp"), webp);
    write(dir.path().join("a/2.png"), png);
    let data = open(&DataConfig { validation: 0.0, ..config(dir.path()) }, 3, 0).unwrap();
    for i in 0..2 {
        let image = data.train.load(i, 3).unwrap();
        assert_eq!((image.height, image.width), (200, 150), "{}", data.train.name(i));
        assert_eq!(data.train.size(i).unwrap(), (200, 150), "{}", data.train.name(i));
        // A quarter turn clockwise brings the bottom left pixel to the top left.
        assert_eq!(image.pixels[..3], noise.get_pixel(0, 149).0);
    }
}

fn ids(source: &dyn Source) -> HashSet<String> {
    names(source).into_iter().collect()
}

#[test]
fn the_split_is_seeded_disjoint_and_stratified() {
    let dir = folder("", &[("a", 20), ("b", 10), ("c", 2), ("d", 1)]);
    let split = |share: f64, seed: u64| {
        open(&DataConfig { validation: share, ..config(dir.path()) }, 1, seed).unwrap()
    };
    let data = split(0.2, 1);
    assert_eq!(counts(&*data.train, 4), [16, 8, 1, 1]);
    assert_eq!(counts(&*data.validation, 4), [4, 2, 1, 0]);
    assert!(ids(&*data.train).is_disjoint(&ids(&*data.validation)));
    assert_eq!(ids(&*data.train).len() + ids(&*data.validation).len(), 33);

    let again = split(0.2, 1);
    assert_eq!(names(&*again.train), names(&*data.train));
    assert_ne!(names(&*split(0.2, 2).validation), names(&*data.validation));
    assert_eq!(counts(&*split(0.99, 1).train, 4), [1, 1, 1, 1]);
    assert_eq!(split(0.0, 1).validation.len(), 0);

    // Classes of one size are not all split at the same places.
    let twins = folder("", &[("a", 20), ("b", 20)]);
    let both = open(&config(twins.path()), 1, 1).unwrap();
    let (a, b): (Vec<_>, Vec<_>) = samples(&*both.validation).into_iter().partition(|(label, _)| *label == 0);
    assert_ne!(a.iter().map(|s| s.1).collect::<Vec<_>>(), b.iter().map(|s| s.1).collect::<Vec<_>>());

    // Another class growing moves nothing in this one.
    make(dir.path(), "", &[("b", 40)]);
    let of_a = |data: &Dataset| {
        names(&*data.validation).into_iter().filter(|n| n.contains("/a/")).collect::<Vec<_>>()
    };
    assert_eq!(of_a(&split(0.2, 1)), of_a(&data));
}

#[test]
fn a_train_folder_alone_is_split() {
    let dir = folder("train", &[("a", 10), ("b", 10)]);
    let data = open_auto(dir.path());
    assert_eq!(data.classes, ["a", "b"]);
    assert_eq!(counts(&*data.validation, 2), [2, 2]);
}

#[test]
fn a_class_may_be_called_train() {
    let dir = folder("", &[("train", 5), ("car", 5)]);
    assert_eq!(open_auto(dir.path()).classes, ["car", "train"]);
}

#[test]
fn wrong_layouts_are_refused() {
    let dir = tempdir().unwrap();
    let root = dir.path();
    assert_refused(open(&config(root.join("nowhere")), 3, 0), &["nowhere", "no such folder"]);
    assert_refused(open(&config(root), 3, 0), &["is empty", "<folder>/cat/1.jpg"]);
    write(root.join("a.png"), grey_png(0));
    assert_refused(open(&config(root), 3, 0), &["images but no class folder", "<folder>/train/cat/1.jpg"]);
    assert_refused(open(&config(root.join("a.png")), 3, 0), &["a.png", "neither a folder nor a .tar file"]);
    fs::rename(root.join("a.png"), root.join("a.txt")).unwrap();
    assert_refused(open(&config(root), 3, 0), &["neither images nor class folders"]);
    make(root, "", &[("cat", 2)]);
    fs::create_dir(root.join("dog")).unwrap();
    assert_refused(open(&config(root), 3, 0), &["dog", "class folder holds no JPEG, PNG or WebP image"]);

    let dir = folder("train", &[("cat", 2)]);
    make(dir.path(), "val", &[("cat", 1), ("cow", 1)]);
    assert_refused(open(&config(dir.path()), 3, 0), &["class `cow`", "no training image"]);
    let dir = folder("val", &[("cat", 2)]);
    assert_refused(open(&config(dir.path()), 3, 0), &["validation images but no training images"]);
}

#[test]
fn wrong_settings_are_refused() {
    let dir = folder("", &[("cat", 2)]);
    for share in [1.0, -0.1, f64::NAN] {
        let config = DataConfig { validation: share, ..config(dir.path()) };
        assert_refused(open(&config, 3, 0), &["data.validation", "below 1"]);
    }
    assert_refused(open(&config(dir.path()), 4, 0), &["model.channels is 4", "1 (grey) or 3 (RGB)"]);
    assert_refused(
        open(&config_of(SourceKind::Digits, dir.path()), 1, 0),
        &["data.source is `digits`", "data.path"],
    );
    assert_refused(open(&config_of(SourceKind::Folder, ""), 1, 0), &["data.path is empty"]);
    assert_refused(open(&config_of(SourceKind::Idx, dir.path()), 1, 0), &["train-images-idx3-ubyte"]);
    assert_refused(open(&config_of(SourceKind::Cifar, dir.path()), 1, 0), &["data_batch_1.bin"]);
    assert_refused(open(&config_of(SourceKind::Tar, dir.path()), 1, 0), &["no .tar file"]);
}

#[test]
fn the_cache_keeps_what_fits_the_shared_budget() {
    let dir = folder("train", &[("a", 3)]);
    make(dir.path(), "val", &[("a", 3)]);
    let plain = open_auto(dir.path());
    // Each image takes 6 bytes in grey.
    let budget = Budget::new(20);
    let cached =
        [&plain.train, &plain.validation].map(|source| Cached::new(Arc::clone(source), budget.clone()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for source in &cached {
                    assert_eq!(samples(source), [(0, 0), (0, 1), (0, 2)]);
                }
            });
        }
    });
    assert_eq!(budget.left(), 2);
    fs::remove_dir_all(dir.path()).unwrap();
    let kept: Vec<_> =
        cached.iter().flat_map(|s| (0..3).map(move |i| s.load(i, 1).is_ok() && s.size(i).is_ok())).collect();
    assert_eq!(kept.iter().filter(|k| **k).count(), 3, "{kept:?}");
}

#[test]
fn a_cache_of_grey_does_not_answer_for_colour() {
    let dir = tempdir().unwrap();
    write(dir.path().join("a/x.png"), encode(&picture(4, 4).into(), ImageFormat::Png));
    let data = open(&DataConfig { validation: 0.0, cache_mib: 1, ..config(dir.path()) }, 3, 0).unwrap();
    data.train.load(0, 1).unwrap();
    assert_eq!(data.train.load(0, 3).unwrap().pixels, picture(4, 4).into_raw());
}

#[test]
fn the_description_says_what_was_read() {
    let dir = folder("", &[("a", 10), ("b", 10)]);
    let description = |dir: &TempDir| open_auto(dir.path()).description;
    assert_eq!(description(&dir), "class folders, validation: automatic split of 20 %, seed 0");
    let dir = folder("train", &[("a", 2)]);
    make(dir.path(), "val", &[("a", 1)]);
    make(dir.path(), "test", &[("a", 1)]);
    make(dir.path(), "extra", &[("b", 1)]);
    assert_eq!(
        description(&dir),
        "class folders, validation: the val part; the test part is left out; not read: extra"
    );
    let digits = open(&DataConfig { validation: 0.0, ..DataConfig::default() }, 1, 0).unwrap();
    assert_eq!(digits.description, "built-in digits, no validation (data.validation = 0)");
}

#[test]
fn no_images_may_be_held_out() {
    let dir = folder("", &[("a", 3), ("b", 1)]);
    let data = open(&DataConfig { validation: 0.0, ..config(dir.path()) }, 3, 0).unwrap();
    assert_eq!((data.train.len(), data.validation.len()), (4, 0));
    // Classes of one image have none to spare.
    let dir = folder("", &[("a", 1), ("b", 1)]);
    assert!(open_auto(dir.path()).validation.is_empty());
}

#[test]
fn an_evaluation_set_needs_no_training_images() {
    let every = folder("", &[("a", 3), ("b", 1)]);
    let data = open_for_eval(&config(every.path()), 3).unwrap();
    assert_eq!((data.train.len(), data.validation.len()), (0, 4));
    assert_eq!(data.description, "class folders, validation: every image");

    let alone = folder("val", &[("a", 3), ("b", 1)]);
    let data = open_for_eval(&config(alone.path()), 3).unwrap();
    assert_eq!((data.train.len(), data.validation.len()), (0, 4));

    let both = folder("train", &[("a", 5), ("c", 1)]);
    make(both.path(), "val", &[("a", 2), ("b", 1)]);
    let data = open_for_eval(&config(both.path()), 3).unwrap();
    assert_eq!((data.train.len(), counts(&*data.validation, 3)), (6, vec![2, 1, 0]));
}

#[test]
fn classes_are_matched_by_name() {
    let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let dir = folder("train", &[("cat", 1), ("owl", 1)]);
    make(dir.path(), "val", &[("cat", 2), ("dog", 1)]);
    let data = open_for_eval(&config(dir.path()), 3).unwrap();
    let matched = data.match_classes(&names(&["ape", "dog", "cat"])).unwrap();
    assert_eq!(samples(&*matched), [(2, 0), (2, 1), (1, 0)]);
    assert_eq!(matched.name(2), data.validation.name(2));
    assert_eq!(matched.size(0).unwrap(), (2, 3));
    let refused = data.match_classes(&names(&["cat", "ape"]));
    assert_refused(refused.map(|_| ()), &["a class that the model was not trained on", "`dog`", "`cat`"]);
}

#[test]
fn fingerprints_follow_names_and_classes() {
    let print = |dir: &TempDir| {
        let data = open(&DataConfig { validation: 0.0, ..config(dir.path()) }, 3, 0).unwrap();
        fingerprint(&*data.train)
    };
    let dir = folder("", &[("a", 2), ("b", 2)]);
    let before = print(&dir);
    assert_eq!(print(&folder("", &[("a", 2), ("b", 2)])), before, "a folder that moved");
    fs::rename(dir.path().join("a/001.png"), dir.path().join("a/002.png")).unwrap();
    assert_ne!(print(&dir), before);
    assert_ne!(print(&folder("", &[("a", 1), ("b", 3)])), before);
}

#[test]
fn a_folder_of_tars_and_classes_is_refused() {
    let dir = folder("", &[("a", 2)]);
    let mut tar = tar::Builder::new(Vec::new());
    let png = grey_png(1);
    let mut header = tar::Header::new_gnu();
    header.set_size(png.len() as u64);
    tar.append_data(&mut header, "a/1.png", png.as_slice()).unwrap();
    write(dir.path().join("set.tar"), tar.into_inner().unwrap());
    assert_refused(open(&config(dir.path()), 3, 0), &["class folders and tar files", "data.source"]);
    for (kind, images) in [(SourceKind::Folder, 2), (SourceKind::Tar, 1)] {
        let data = open(&config_of(kind, dir.path()), 3, 0).unwrap();
        assert_eq!(data.train.len() + data.validation.len(), images);
    }
    // A tar file without images is none of ours.
    write(dir.path().join("set.tar"), tar::Builder::new(Vec::new()).into_inner().unwrap());
    assert_eq!(open_auto(dir.path()).classes, ["a"]);
}

#[cfg(unix)]
#[test]
fn links_pipes_and_odd_names() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;
    let dir = folder("", &[("a", 2), ("b", 2)]);
    // Two links to one folder are no loop.
    symlink(dir.path().join("b"), dir.path().join("a/again")).unwrap();
    let pipe = std::process::Command::new("mkfifo").arg(dir.path().join("a/pipe.png")).status().unwrap();
    assert!(pipe.success());
    let count = |dir: &TempDir| open_for_eval(&config(dir.path()), 3).unwrap().validation.len();
    assert_eq!(count(&dir), 6);
    symlink(dir.path().join("gone.png"), dir.path().join("a/broken.png")).unwrap();
    assert_eq!(count(&dir), 7);
    symlink(dir.path().join("a"), dir.path().join("a/loop")).unwrap();
    assert_refused(open(&config(dir.path()), 3, 0), &["a/loop", "leads back to"]);
    fs::remove_file(dir.path().join("a/loop")).unwrap();
    symlink("..", dir.path().join("b/up")).unwrap();
    assert_refused(open(&config(dir.path()), 3, 0), &["/up", "leads back to"]);

    for (name, what) in [(&b"caf\xe9"[..], "not valid UTF-8"), (b"a\x1bb", "control characters")] {
        let dir = folder("", &[("a", 1)]);
        write(dir.path().join(OsStr::from_bytes(name)).join("1.png"), grey_png(0));
        assert_refused(open(&config(dir.path()), 3, 0), &["class name", what]);
    }
}
