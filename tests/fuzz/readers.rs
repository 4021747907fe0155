//! Mutated files through the readers: they answer with tensors, images or a sentence, in bounded time and memory.

use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tempfile::{TempDir, tempdir};
use trencadis::Error;
use trencadis::data::source::open;
use trencadis::recipe::DataConfig;
use trencadis::weights::{Tensors, Weights};

use crate::formats::fixture;
use crate::memory::{Counting, LIVE, PEAK};
use crate::mutants::Mutant;

/// Damaged files a reader; `TRENCADIS_FUZZ=100000` for a longer search.
fn files() -> u64 {
    std::env::var("TRENCADIS_FUZZ").ok().and_then(|files| files.parse().ok()).unwrap_or(1500)
}

/// Most bytes that a reader may hold: the files have some thousand, and deflate makes at most a thousand of one.
const MOST: usize = 48 << 20;
/// Longest time a file may take, on a machine that has other things to do.
const LONGEST: Duration = Duration::from_secs(10);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Readers take turns, so that each answers for its own memory.
static TURN: Mutex<()> = Mutex::new(());

/// How many of the files were read and how many refused.
#[derive(Debug, Default)]
struct Answers {
    read: u64,
    refused: u64,
}

/// Runs `read` on damaged versions of the `originals`, one after another, in the place of the file `path`.
fn run(seed: u64, path: &Path, originals: &[Vec<u8>], read: impl Fn() -> Result<(), Error>) {
    // Taken away first: some file systems wait for the disk where a file is cut and written anew.
    let write = |bytes: &[u8]| {
        let _ = fs::remove_file(path);
        fs::write(path, bytes).unwrap();
    };
    let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    for original in originals {
        write(original);
        read().unwrap_or_else(|error| panic!("the original must be read: {error}"));
    }
    let mut answers = Answers::default();
    for number in 0..files() {
        let mut mutant = Mutant::new(seed, number);
        let count = originals.len();
        let file = mutant.of(&originals[number as usize % count], &originals[(number as usize + 1) % count]);
        write(&file);
        let (live, start) = (LIVE.load(Ordering::Relaxed), Instant::now());
        PEAK.store(live, Ordering::Relaxed);
        let answer = catch_unwind(AssertUnwindSafe(&read));
        let (held, took) = (PEAK.load(Ordering::Relaxed).saturating_sub(live), start.elapsed());
        assert!(held < MOST, "file {number} of seed {seed} takes {held} bytes for {}", file.len());
        assert!(took < LONGEST, "file {number} of seed {seed} takes {took:?}");
        match answer {
            Ok(Ok(())) => answers.read += 1,
            Ok(Err(error)) => {
                let sentence = error.to_string();
                assert_eq!(error.exit_code(), 2, "file {number} of seed {seed}: {sentence}");
                assert!(sentence.len() > 20, "file {number} of seed {seed}: {sentence:?}");
                answers.refused += 1;
            }
            Err(_) => panic!("file {number} of seed {seed} ends the program"),
        }
    }
    // Damage that no reader notices, and damage that every one does, would be no damage worth trying.
    assert!(answers.refused > files() / 20 && answers.read > 0, "{answers:?}");
}

/// Reads everything in a file of weights.
fn read_weights(path: &Path) -> Result<(), Error> {
    let weights = Weights::load(path)?;
    for (name, (shape, values)) in &weights.tensors {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
    }
    Tensors::load_metadata(path).map(drop)
}

fn weights_run(seed: u64, originals: &[Vec<u8>]) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("weights");
    run(seed, &path, originals, || read_weights(&path));
}

#[test]
fn safetensors() {
    let mut large = Weights::load(&fixture("numpy.safetensors")).unwrap();
    large.metadata.insert("recipe".into(), "[model]\nwidth = 16\n".into());
    large.tensors.insert("long".into(), (vec![2, 500], vec![0.25; 1000]));
    let dir = tempdir().unwrap();
    large.save_atomic(&dir.path().join("w")).unwrap();
    weights_run(
        1,
        &[fs::read(fixture("numpy.safetensors")).unwrap(), fs::read(dir.path().join("w")).unwrap()],
    );
}

#[test]
fn npz() {
    weights_run(2, &["numpy.npz", "numpy_compressed.npz"].map(|name| fs::read(fixture(name)).unwrap()));
}

/// Indexes of ours and of other libraries, beside files that are whole.
#[test]
fn indexes() {
    let dir = tempdir().unwrap();
    let mut weights = Weights::default();
    weights.tensors.insert("a".into(), (vec![6, 2], (0..12).map(|i| i as f32).collect()));
    weights.save_atomic(&dir.path().join("one.safetensors")).unwrap();
    weights.tensors.insert("b".into(), (vec![3], vec![1.0, 2.0, 3.0]));
    weights.save_atomic(&dir.path().join("two.safetensors")).unwrap();
    let ours = r#"{"set": "", "metadata": {"recipe": "a text of some length that means nothing here"}, "weight_map": {
        "a": {"shape": [12, 2], "slices": [
            {"file": "one.safetensors", "split": "rows:3", "part": [0, 2], "range": [0, 12]},
            {"file": "two.safetensors", "split": "rows:3", "part": [1, 2], "range": [0, 12]}]},
        "b": {"shape": [3], "slices": [{"file": "two.safetensors", "split": "whole", "part": [0, 1], "range": [0, 3]}]}}}"#;
    let theirs = r#"{"metadata": {"total_size": 60, "note": "a text of some length that means nothing here"},
        "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    let path = dir.path().join("model.safetensors.index.json");
    run(8, &path, &[ours, theirs].map(|text| text.as_bytes().to_vec()), || read_weights(&path));
}

/// Opens a data set and reads some of its images.
fn read_images(path: &Path) -> Result<(), Error> {
    let config = DataConfig { path: path.display().to_string(), ..DataConfig::default() };
    let data = open(&config, 3, 0)?;
    for source in [&data.train, &data.validation] {
        for i in 0..source.len().min(4) {
            let (height, width) = source.size(i)?;
            // What a picture's header says is for the decoder to bound, and the bound is one of pictures.
            if height * width <= 1 << 20 {
                let image = source.load(i, 3)?;
                assert_eq!(image.pixels.len(), image.height * image.width * 3, "{}", source.name(i));
            }
        }
    }
    Ok(())
}

/// A data set in which one file is damaged.
fn images_run(seed: u64, dir: &TempDir, file: &str, originals: &[Vec<u8>]) {
    run(seed, &dir.path().join(file), originals, || read_images(dir.path()));
}

fn png(value: u8) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let picture =
        image::GrayImage::from_fn(9, 7, |x, y| image::Luma([value.wrapping_mul(x as u8 + y as u8)]));
    image::DynamicImage::from(picture).write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn tar_of(members: &[(&str, Vec<u8>)], extensions: bool) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, data) in members {
        if extensions {
            let long = format!("{}/{path}", "folder".repeat(20));
            builder.append_pax_extensions([("path", long.as_bytes())]).unwrap();
        }
        let mut header = if extensions { tar::Header::new_ustar() } else { tar::Header::new_gnu() };
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, data.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn tar_files() {
    let dir = tempdir().unwrap();
    let long = format!("{}/0003.png", "long".repeat(30));
    let labels = [
        ("0001.png", png(1)),
        ("0001.cls", b"1".to_vec()),
        ("0002.png", png(2)),
        ("0002.json", br#"{"label": 0}"#.to_vec()),
    ];
    let classes =
        [("cat/1.png", png(3)), ("cat/2.png", png(4)), ("dog/1.png", png(5)), (long.as_str(), png(6))];
    let originals = [tar_of(&labels, false), tar_of(&classes, false), tar_of(&labels, true)];
    images_run(3, &dir, "set.tar", &originals);
}

fn idx(magic: u32, sizes: &[u32], data: &[u8]) -> Vec<u8> {
    let words = [&[magic], sizes].concat();
    [words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>().as_slice(), data].concat()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn idx_files() {
    let pictures = |value: u8| idx(0x803, &[6, 5, 4], &[value; 120]);
    let labels = |shift: u8| idx(0x801, &[6], &[0, 1, 2, 0, 1, shift]);
    // Damage to the pictures, packed and not, and to the labels.
    for (seed, file, originals) in [
        (4, "train-images-idx3-ubyte", [pictures(1), pictures(2)]),
        (5, "train-images-idx3-ubyte.gz", [gzip(&pictures(1)), gzip(&pictures(2))]),
        (6, "train-labels-idx1-ubyte", [labels(0), labels(2)]),
    ] {
        let dir = tempdir().unwrap();
        if seed == 6 {
            fs::write(dir.path().join("train-images-idx3-ubyte"), pictures(1)).unwrap();
        } else {
            fs::write(dir.path().join("train-labels-idx1-ubyte"), labels(0)).unwrap();
        }
        images_run(seed, &dir, file, &originals);
    }
}

#[test]
fn cifar_files() {
    let dir = tempdir().unwrap();
    let batch = |first: u8| -> Vec<u8> {
        let record = |label: u8| std::iter::once(label).chain((0..3072).map(|i| (i % 251) as u8));
        record(first).chain(record(first + 1)).collect()
    };
    for n in 2..=5 {
        fs::write(dir.path().join(format!("data_batch_{n}.bin")), batch(n)).unwrap();
    }
    images_run(7, &dir, "data_batch_1.bin", &[batch(0), batch(8)]);
}
