//! Folders of exported kernels.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::tempdir;
use trencadis::device::fatbins::{Fatbins, SOURCES};
use trencadis::kernels::registry::sources;

/// FNV-1a of `bytes` as a manifest has it.
fn hash(bytes: &[u8]) -> String {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

/// What stands in for compiled code: the name of the fatbin, as a C string.
fn code(stem: &str) -> Vec<u8> {
    format!("{stem}.fatbin\0").into_bytes()
}

/// Writes a folder of kernels for `sm_90` that no GPU would run, and returns its manifest.
pub fn write(folder: &Path) -> Value {
    let mut fatbins = Vec::new();
    for source in sources() {
        let (stem, code) = (source.stem(), code(source.stem()));
        let names: Vec<_> = source.kernels.iter().map(|kernel| &kernel.name).collect();
        fatbins.push(json!({"stem": stem, "bytes": code.len(), "hash": hash(&code), "kernels": names}));
        fs::write(folder.join(format!("{stem}.fatbin")), code).unwrap();
    }
    let manifest = json!({
        "format": 1,
        "trencadis": "0.0.0",
        "sources": SOURCES,
        "compiler": "13.0.1",
        "architectures": ["sm_90"],
        "fatbins": fatbins,
    });
    save(folder, &manifest);
    manifest
}

fn save(folder: &Path, manifest: &Value) {
    fs::write(folder.join("manifest.json"), manifest.to_string()).unwrap();
}

#[test]
fn exported_kernels_are_read_back() {
    let (first, second) = (tempdir().unwrap(), tempdir().unwrap());
    write(first.path());
    let fatbins = Fatbins::load(first.path()).unwrap();
    assert_eq!(fatbins.len(), sources().len());
    assert_eq!((fatbins.compiler(), fatbins.architectures()), ("13.0.1", &["sm_90".to_string()][..]));
    assert_eq!(fatbins.code_for((9, 0)), Some("sm_90"));
    assert_eq!(fatbins.code_for((8, 0)), None);

    let folder = second.path().join("made/by/export");
    fatbins.export(&folder).unwrap();
    let again = Fatbins::load(&folder).unwrap();
    assert_eq!(again.bytes_in_all(), fatbins.bytes_in_all());
    assert_eq!(again.architectures(), fatbins.architectures());
    for source in sources() {
        let file = format!("{}.fatbin", source.stem());
        assert_eq!(fs::read(folder.join(&file)).unwrap(), fs::read(first.path().join(&file)).unwrap());
    }
}

#[test]
fn the_kernels_of_this_build_survive_an_export() {
    let folder = tempdir().unwrap();
    match Fatbins::embedded() {
        Ok(fatbins) => {
            assert_eq!(fatbins.len(), sources().len());
            fatbins.export(folder.path()).unwrap();
            let again = Fatbins::load(folder.path()).unwrap();
            assert_eq!(again.bytes_in_all(), fatbins.bytes_in_all());
        }
        Err(reason) => assert!(reason.to_string().contains("tools/install-cuda"), "{reason}"),
    }
}

#[track_caller]
fn refused(folder: &Path, parts: &[&str]) {
    let error = Fatbins::load(folder).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in: {text}");
    }
}

#[test]
fn a_damaged_folder_is_refused_and_the_file_named() {
    let place = tempdir().unwrap();
    let folder = place.path();
    refused(&folder.join("absent"), &["absent/manifest.json", "cannot be read", "--export"]);
    let manifest = write(folder);

    for (key, value, parts) in [
        ("format", json!(2), &["manifest.json", "format 2", "export"][..]),
        ("sources", json!("0123"), &["manifest.json", "other kernel sources (0123)", SOURCES]),
        ("fatbins", json!("none"), &["manifest.json", "is no manifest"]),
        (
            "fatbins",
            json!([{"stem": "../x", "bytes": 1, "hash": "", "kernels": []}]),
            &["manifest.json", "lists"],
        ),
    ] {
        let mut damaged = manifest.clone();
        damaged[key] = value;
        save(folder, &damaged);
        refused(folder, parts);
    }
    save(folder, &Value::Null);
    refused(folder, &["manifest.json", "is no manifest"]);

    let Some(source) = sources().into_iter().next() else { return };
    let stem = source.stem();
    let mut damaged = manifest.clone();
    damaged["fatbins"].as_array_mut().unwrap().remove(0);
    save(folder, &damaged);
    refused(folder, &["manifest.json", &format!("lists no {stem}.fatbin")]);
    let mut damaged = manifest.clone();
    damaged["fatbins"][0]["kernels"].as_array_mut().unwrap().remove(0);
    save(folder, &damaged);
    refused(folder, &["manifest.json", &format!("lists no kernel {}", source.kernels[0].name), stem]);

    save(folder, &manifest);
    let file = folder.join(format!("{stem}.fatbin"));
    fs::write(&file, b"short").unwrap();
    refused(folder, &[&file.display().to_string(), "has 5 bytes"]);
    let mut other = code(stem);
    other[0] ^= 1;
    fs::write(&file, other).unwrap();
    refused(folder, &[&file.display().to_string(), "is damaged"]);
    fs::remove_file(&file).unwrap();
    refused(folder, &[&file.display().to_string(), "cannot be read"]);
}
