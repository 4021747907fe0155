//! Folders of exported kernels.

use std::fs;
use std::path::Path;

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
pub fn write(folder: &Path) -> String {
    let mut manifest =
        format!("format 2\ntrencadis 0.0.0\nsources {SOURCES}\ncompiler 13.0.1\narchitectures sm_90\n");
    for source in sources() {
        let (stem, code) = (source.stem(), code(source.stem()));
        manifest += &format!("fatbin {stem} {} {}\n", code.len(), hash(&code));
        for kernel in &source.kernels {
            manifest += &format!("kernel {}\n", kernel.name);
        }
        fs::write(folder.join(format!("{stem}.fatbin")), code).unwrap();
    }
    save(folder, &manifest);
    manifest
}

fn save(folder: &Path, manifest: &str) {
    fs::write(folder.join("manifest.txt"), manifest).unwrap();
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
    refused(&folder.join("absent"), &["absent/manifest.txt", "cannot be read", "--export"]);
    let manifest = write(folder);
    let without = |part: &str| {
        let lines = manifest.lines().filter(|line| !line.starts_with(part));
        lines.map(|line| format!("{line}\n")).collect::<String>()
    };

    for (damaged, parts) in [
        (manifest.replace("format 2", "format 3"), &["manifest.txt", "format 3", "export"][..]),
        (manifest.replace(SOURCES, "0123"), &["manifest.txt", "other kernel sources (0123)", SOURCES]),
        (without("fatbin "), &["manifest.txt", "is no manifest"]),
        (format!("{manifest}fatbin ../x 1 0\n"), &["manifest.txt", "lists a fatbin by a path (../x)"]),
        (without("compiler"), &["manifest.txt", "is no manifest"]),
        (String::new(), &["manifest.txt", "is no manifest"]),
    ] {
        save(folder, &damaged);
        refused(folder, parts);
    }

    let Some(source) = sources().into_iter().next() else { return };
    let stem = source.stem();
    let first = manifest.find("fatbin ").unwrap();
    let second = manifest[first + 1..].find("fatbin ").unwrap() + first + 1;
    save(folder, &format!("{}{}", &manifest[..first], &manifest[second..]));
    refused(folder, &["manifest.txt", &format!("lists no {stem}.fatbin")]);
    let name = &source.kernels[0].name;
    save(folder, &manifest.replacen(&format!("kernel {name}\n"), "", 1));
    refused(folder, &["manifest.txt", &format!("lists no kernel {name}"), stem]);

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
