//! Writing kernels to a folder and reading them back.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use super::manifest::{Entry, Manifest};
use super::{Fatbin, Fatbins, SOURCES};
use crate::files::write_atomic;
use crate::hash::fnv1a;
use crate::kernels::registry;
use crate::{Error, Result};

const MANIFEST: &str = "manifest.txt";

impl Fatbins {
    /// Writes `<stem>.fatbin` files and `manifest.txt` to `folder`, which is made where it is missing.
    /// The manifest comes last: a folder that has one is whole, or its files are found to differ from it.
    ///
    /// # Errors
    /// The folder cannot be made or written.
    pub fn export(&self, folder: &Path) -> Result<()> {
        if folder.exists() && !folder.is_dir() {
            return Err(Error::file(
                folder,
                "is a file; choose a folder to export to, which need not be there yet",
            ));
        }
        fs::create_dir_all(folder).map_err(|cause| Error::io(folder, cause))?;
        for fatbin in &self.fatbins {
            write_atomic(&file(folder, &fatbin.stem), |w| w.write_all(&fatbin.bytes))?;
        }
        let sources = registry::sources();
        let kernels = |stem: &str| {
            let source = sources.iter().find(|source| source.stem() == stem);
            source.map_or_else(Vec::new, |source| source.kernels.iter().map(|k| k.name.clone()).collect())
        };
        let manifest = Manifest {
            trencadis: env!("CARGO_PKG_VERSION").into(),
            sources: SOURCES.into(),
            compiler: self.compiler.clone(),
            architectures: self.architectures.clone(),
            fatbins: (self.fatbins.iter())
                .map(|fatbin| Entry {
                    stem: fatbin.stem.clone(),
                    bytes: fatbin.bytes.len() as u64,
                    hash: hash(&fatbin.bytes),
                    kernels: kernels(&fatbin.stem),
                })
                .collect(),
        };
        write_atomic(&folder.join(MANIFEST), |w| w.write_all(manifest.text().as_bytes()))
    }

    /// The kernels that [`export`](Self::export) has written to `folder`.
    ///
    /// # Errors
    /// A file that is missing, damaged or made from other sources than this program; it is named.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(|cause| {
            Error::file(
                &path,
                format_args!("cannot be read ({cause}); `trencadis kernels --export` writes it"),
            )
        })?;
        let manifest = Manifest::parse(&text).map_err(|what| Error::file(&path, what))?;
        check(&manifest).map_err(|what| Error::file(&path, what))?;
        let fatbins = manifest.fatbins.into_iter().map(|entry| read(folder, entry)).collect::<Result<_>>()?;
        Ok(Self {
            folder: Some(folder.into()),
            compiler: manifest.compiler,
            architectures: manifest.architectures,
            fatbins,
        })
    }
}

fn file(folder: &Path, stem: &str) -> std::path::PathBuf {
    folder.join(format!("{stem}.fatbin"))
}

fn hash(bytes: &[u8]) -> String {
    format!("{:016x}", fnv1a(bytes))
}

/// Whether the kernels are those of this program, all of them.
fn check(manifest: &Manifest) -> Result<(), String> {
    if manifest.sources != SOURCES {
        return Err(format!(
            "is of trencadis {} with other kernel sources ({}) than this program ({SOURCES}, version {}); \
             export the kernels with this version",
            manifest.trencadis,
            manifest.sources,
            env!("CARGO_PKG_VERSION")
        ));
    }
    for source in registry::sources() {
        let stem = source.stem();
        let Some(entry) = manifest.fatbins.iter().find(|entry| entry.stem == stem) else {
            return Err(format!("lists no {stem}.fatbin; export the kernels again"));
        };
        if let Some(kernel) = source.kernels.iter().find(|kernel| !entry.kernels.contains(&kernel.name)) {
            return Err(format!(
                "lists no kernel {} in {stem}.fatbin; export the kernels again",
                kernel.name
            ));
        }
    }
    // Names come from the file and become paths.
    match manifest.fatbins.iter().find(|entry| entry.stem.contains(['/', '\\'])) {
        Some(entry) => Err(format!("lists a fatbin by a path ({}); export the kernels again", entry.stem)),
        None => Ok(()),
    }
}

fn read(folder: &Path, entry: Entry) -> Result<Fatbin> {
    let path = file(folder, &entry.stem);
    let bytes = fs::read(&path).map_err(|cause| {
        Error::file(&path, format_args!("cannot be read ({cause}); export the kernels again"))
    })?;
    if bytes.len() as u64 != entry.bytes {
        let cause = format!(
            "has {} bytes and the manifest says {}; export the kernels again",
            bytes.len(),
            entry.bytes
        );
        return Err(Error::file(&path, cause));
    }
    if hash(&bytes) != entry.hash {
        return Err(Error::file(
            &path,
            "is damaged (it differs from the manifest); export the kernels again",
        ));
    }
    Ok(Fatbin { stem: entry.stem, bytes: Cow::Owned(bytes) })
}
