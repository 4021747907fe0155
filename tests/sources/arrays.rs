//! Sources that are held in memory: the built-in digits, IDX and CIFAR files.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use tempfile::tempdir;
use trencadis::data::source::open;
use trencadis::models::recipe::DataConfig;

use super::*;

#[test]
fn digits_are_complete_and_cropped() {
    let data = open(&DataConfig::default(), 1, 3).unwrap();
    assert_eq!(data.train.len() + data.validation.len(), 1797);
    assert_eq!(data.classes, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]);
    let per_class: Vec<usize> =
        counts(&*data.train, 10).iter().zip(counts(&*data.validation, 10)).map(|(a, b)| a + b).collect();
    // The counts that scikit-learn documents for load_digits.
    assert_eq!(per_class, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
    for (train, validation) in counts(&*data.train, 10).iter().zip(counts(&*data.validation, 10)) {
        assert!((train + validation) as f64 * 0.2 - validation as f64 <= 0.5);
    }
    let mut widths = HashSet::new();
    for i in 0..data.train.len() {
        let image = data.train.load(i, 1).unwrap();
        assert_eq!(data.train.size(i).unwrap(), (image.height, image.width));
        assert_eq!(image.pixels.len(), image.height * image.width);
        assert!((2..=8).contains(&image.width) && (2..=8).contains(&image.height));
        widths.insert(image.width);
        let rows: Vec<&[u8]> = image.pixels.chunks(image.width).collect();
        assert!(rows[0].iter().any(|&v| v > 0) && rows[image.height - 1].iter().any(|&v| v > 0));
    }
    assert!(widths.len() > 3, "{widths:?}");
    assert_eq!(data.train.load(0, 3).unwrap().channels, 3);
    let again = open(&DataConfig::default(), 1, 3).unwrap();
    assert_eq!(names(&*again.validation), names(&*data.validation));
}

fn idx(magic: u32, sizes: &[u32], data: &[u8]) -> Vec<u8> {
    let words = [&[magic], sizes].concat();
    [words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<u8>>().as_slice(), data].concat()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn idx_folder(root: &Path) {
    write(
        root.join("train-images-idx3-ubyte.gz"),
        gzip(&idx(0x803, &[3, 2, 4], &(0..24).collect::<Vec<u8>>())),
    );
    write(root.join("train-labels-idx1-ubyte.gz"), gzip(&idx(0x801, &[3], &[2, 0, 1])));
    write(root.join("t10k-images-idx3-ubyte"), idx(0x803, &[1, 2, 4], &[9; 8]));
    write(root.join("t10k-labels-idx1-ubyte"), idx(0x801, &[1], &[1]));
}

#[test]
fn idx_files_packed_or_not() {
    let dir = tempdir().unwrap();
    idx_folder(dir.path());
    let data = open_auto(dir.path());
    assert_eq!(data.classes, ["0", "1", "2"]);
    assert_eq!(samples(&*data.train), [(2, 0), (0, 8), (1, 16)]);
    assert_eq!(samples(&*data.validation), [(1, 9)]);
    let image = data.train.load(1, 1).unwrap();
    assert_eq!((image.height, image.width, image.pixels), (2, 4, (8..16).collect()));
    assert!(data.train.name(1).ends_with("train-images-idx3-ubyte.gz image 1"));

    // The unpacked file beside the packed one is the same data.
    write(dir.path().join("train-images-idx3-ubyte"), idx(0x803, &[3, 2, 4], &[5; 24]));
    assert_eq!(open_auto(dir.path()).train.len(), 3);

    write(dir.path().join("classes.txt"), "shirt\nshoe\nhat\nglove\n");
    assert_eq!(open_auto(dir.path()).classes, ["shirt", "shoe", "hat", "glove"]);
    write(dir.path().join("classes.txt"), "shirt\nshoe\n");
    assert_refused(open(&config(dir.path()), 1, 0), &["label 2 has no name", "2 names"]);
}

#[test]
fn idx_without_test_files_is_split() {
    let dir = tempdir().unwrap();
    write(dir.path().join("train-images-idx3-ubyte"), idx(0x803, &[10, 1, 1], &[0; 10]));
    write(dir.path().join("train-labels-idx1-ubyte"), idx(0x801, &[10], &[0, 1, 0, 1, 0, 1, 0, 1, 0, 1]));
    assert_eq!(counts(&*open_auto(dir.path()).validation, 2), [1, 1]);
}

#[test]
fn wrong_idx_files_are_refused() {
    let dir = tempdir().unwrap();
    let images = dir.path().join("train-images-idx3-ubyte");
    let labels = dir.path().join("train-labels-idx1-ubyte");
    let refused = |parts: &[&str]| assert_refused(open(&config(dir.path()), 1, 0), parts);
    write(&images, idx(0x803, &[2, 1, 1], &[0; 2]));
    refused(&["train-images-idx3-ubyte", "labels train-labels-idx1-ubyte", "missing"]);
    write(&labels, idx(0x801, &[3], &[0; 3]));
    refused(&["3 labels for the 2 images"]);
    write(&labels, idx(0x803, &[3], &[0; 3]));
    refused(&["train-labels", "0x00000803", "0x00000801 was expected"]);
    write(&labels, idx(0x801, &[2], &[0; 2]));
    write(&images, idx(0x803, &[2, 1, 1], &[0; 1]));
    refused(&["train-images", "[2, 1, 1]", "1 follow", "fetch it again"]);
    write(&images, idx(0x803, &[u32::MAX, u32::MAX, u32::MAX], &[0; 1]));
    refused(&["train-images", "fetch it again"]);
    write(&images, [0, 0]);
    refused(&["shorter than an IDX header"]);
    let packed = gzip(&idx(0x803, &[2, 30, 30], &(0..1800).map(|i| (i * i) as u8).collect::<Vec<u8>>()));
    write(&images, &packed[..packed.len() / 2]);
    refused(&["gzip data is cut or damaged"]);
    write(&images, idx(0x803, &[0, 1, 1], &[]));
    write(&labels, idx(0x801, &[0], &[]));
    refused(&["0 images"]);
    fs::remove_file(&images).unwrap();
    write(dir.path().join("letters-train-images-idx3-ubyte"), idx(0x803, &[1, 1, 1], &[0]));
    write(dir.path().join("letters-train-labels-idx1-ubyte"), idx(0x801, &[1], &[0]));
    assert_eq!(open_auto(dir.path()).train.len(), 1);
    write(&images, idx(0x803, &[1, 1, 1], &[0]));
    write(&labels, idx(0x801, &[1], &[0]));
    refused(&["several Train files", "one data set a folder"]);
}

/// A CIFAR record whose planes are all `value`, `value + 1` and `value + 2`.
fn record(labels: &[u8], value: u8) -> Vec<u8> {
    let planes = [[value; 1024], [value + 1; 1024], [value + 2; 1024]].concat();
    [labels, planes.as_slice()].concat()
}

fn cifar10(root: &Path) {
    for n in 1..=5 {
        write(
            root.join(format!("data_batch_{n}.bin")),
            [record(&[n - 1], n), record(&[9], 100 + n)].concat(),
        );
    }
    write(root.join("test_batch.bin"), record(&[3], 7));
    write(
        root.join("batches.meta.txt"),
        "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n",
    );
}

#[test]
fn cifar_10() {
    let dir = tempdir().unwrap();
    for root in [dir.path().to_path_buf(), dir.path().join("outer/cifar-10-batches-bin")] {
        cifar10(&root);
    }
    for root in [dir.path().to_path_buf(), dir.path().join("outer")] {
        let data = open_auto(root);
        assert_eq!((data.train.len(), data.validation.len(), data.classes.len()), (10, 1, 10));
        assert_eq!(data.classes[data.validation.label(0)], "cat");
        let image = data.train.load(5, 3).unwrap();
        assert_eq!(
            (image.height, image.width, &image.pixels[..6]),
            (32, 32, &[103, 104, 105, 103, 104, 105][..])
        );
        assert!(data.train.name(5).ends_with("data_batch_3.bin image 1"));
    }
}

#[test]
fn cifar_100_counts_the_fine_label() {
    let dir = tempdir().unwrap();
    write(
        dir.path().join("train.bin"),
        [record(&[4, 2], 1), record(&[1, 0], 2), record(&[0, 1], 3)].concat(),
    );
    write(dir.path().join("test.bin"), record(&[0, 1], 3));
    write(dir.path().join("fine_label_names.txt"), "apple\naquarium_fish\nbaby\n");
    let data = open_auto(dir.path());
    assert_eq!(data.classes, ["apple", "aquarium_fish", "baby"]);
    assert_eq!((0..3).map(|i| data.train.label(i)).collect::<Vec<_>>(), [2, 0, 1]);
}

#[test]
fn wrong_cifar_files_are_refused() {
    let dir = tempdir().unwrap();
    cifar10(dir.path());
    let refused = |parts: &[&str]| assert_refused(open(&config(dir.path()), 3, 0), parts);
    write(dir.path().join("data_batch_2.bin"), &record(&[0], 0)[1..]);
    refused(&["data_batch_2.bin", "3072 bytes", "3073-byte records"]);
    write(dir.path().join("data_batch_2.bin"), record(&[10], 0));
    refused(&["data_batch_2.bin", "label 10 of 10"]);
    fs::remove_file(dir.path().join("data_batch_2.bin")).unwrap();
    refused(&["data_batch_2.bin", "cannot be read"]);
    let python = tempdir().unwrap();
    write(python.path().join("data_batch_1"), "pickle");
    let config = config_of(trencadis::models::recipe::SourceKind::Cifar, python.path());
    assert_refused(open(&config, 3, 0), &["Python version", "binary version"]);
}
