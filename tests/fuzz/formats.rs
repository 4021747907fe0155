//! What files of weights are is told by their content, whatever their names say.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::tempdir;
use trencadis::weights::{Tensors, Weights};

use crate::readers::gzip;

/// A file of `tools/make_weight_files.py`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/files").join(name)
}

/// The sentence of a file that is refused under a name of no meaning.
fn refusal(bytes: &[u8]) -> String {
    let dir = tempdir().unwrap();
    let path = dir.path().join("weights.safetensors");
    fs::write(&path, bytes).unwrap();
    let error = Weights::load(&path).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let sentence = error.to_string();
    assert!(sentence.starts_with(&path.display().to_string()), "{sentence}");
    sentence
}

#[test]
fn npz_archives_are_read_as_numpy_means_them() {
    let expected = Weights::load(&fixture("numpy.safetensors")).unwrap();
    let dir = tempdir().unwrap();
    for name in ["numpy.npz", "numpy_compressed.npz"] {
        let path = dir.path().join("weights.bin");
        fs::copy(fixture(name), &path).unwrap();
        let read = Weights::load(&path).unwrap();
        assert_eq!(read.tensors.len(), expected.tensors.len(), "{name}");
        for (tensor, (shape, values)) in &expected.tensors {
            assert_eq!(read.tensors[tensor], (shape.clone(), values.clone()), "{name} {tensor}");
        }
        let some = Weights::load_where(&path, |name| name == "params/half").unwrap();
        assert_eq!(some.tensors.len(), 1);
        let tensors = Tensors::open(&path).unwrap();
        assert_eq!(tensors.shape("params/fortran"), Some(&[2, 3, 4][..]));
        let all = &expected.tensors["params/fortran"].1;
        assert_eq!(
            tensors.read("params/fortran", &[1..3, 20..24]).unwrap(),
            [&all[1..3], &all[20..]].concat()
        );
        let beyond = tensors.read("params/fortran", std::slice::from_ref(&(23..25))).unwrap_err().to_string();
        assert!(beyond.contains("array params/fortran: has 24 elements, fewer than 25"), "{beyond}");
    }
}

#[test]
fn arrays_of_other_types_are_named() {
    let sentence = refusal(&fs::read(fixture("integers.npz")).unwrap());
    assert!(sentence.contains("array step: has type \"<i8\", expected little-endian f4"), "{sentence}");
    let some = Weights::load_where(&fixture("integers.npz"), |name| name != "step").unwrap();
    assert_eq!(some.tensors["params/kernel"].0, [3, 4]);
}

#[test]
fn pickles_come_with_the_lines_that_convert_them() {
    for name in ["zip.pth", "legacy.pth"] {
        let sentence = refusal(&fs::read(fixture(name)).unwrap());
        for part in [
            "a Python pickle",
            "import torch",
            "weights_only=True",
            "save_file(",
            "weights.converted.safetensors'",
        ] {
            assert!(sentence.contains(part), "{name}: {sentence}");
        }
    }
    // A file that was cut short is still what it was.
    let cut = fs::read(fixture("zip.pth")).unwrap();
    assert!(refusal(&cut[..cut.len() / 2]).contains("a Python pickle"));
}

#[test]
fn other_files_are_told_by_their_content() {
    for (bytes, part) in [
        (fs::read(fixture("graph.onnx")).unwrap(), "is an ONNX graph"),
        (fs::read(fixture("array.npy")).unwrap(), "is a single NumPy array"),
        (b"\x89HDF\r\n\x1a\n and more".to_vec(), "is an HDF5 file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n".to_vec(), "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>not found</html>".to_vec(), "is a web page"),
        // Without a time, so that its start reads as the length of a short header.
        (gzip(&[7; 100]), "is gzip data"),
        ([gzip(&[7; 100]), vec![0; 600_000]].concat(), "is gzip data"),
        (b"PK\x03\x04 a zip archive".to_vec(), "is a zip file, but none of NumPy arrays"),
        (b"no format at all, merely text".to_vec(), "does not start with the length of a header"),
    ] {
        let sentence = refusal(&bytes);
        assert!(sentence.contains(part), "{sentence}");
    }
}

#[test]
fn damaged_archives_are_a_sentence() {
    let whole = fs::read(fixture("numpy.npz")).unwrap();
    assert!(refusal(&whole[..whole.len() - 30]).contains("list of members is missing or damaged"));
    // A value: the checksum is no longer that of the member.
    let mut changed = whole.clone();
    let at = whole.windows(6).position(|window| window == b"\x93NUMPY").unwrap() + 128;
    changed[at] ^= 1;
    let sentence = refusal(&changed);
    assert!(sentence.contains("array params/embedding/kernel: is damaged"), "{sentence}");
    // A shape of more elements than there are.
    let text = b"'shape': (2, 3, 4)";
    let mut lie = whole.clone();
    let at = whole.windows(text.len()).position(|window| window == text).unwrap();
    lie[at..at + text.len()].copy_from_slice(b"'shape': (9, 3, 4)");
    let sentence = refusal(&lie);
    assert!(sentence.contains("params/embedding/kernel"), "{sentence}");
}
