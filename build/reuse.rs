//! What another build has made of the same text: that of another profile or other features, which differ in nothing here.

use std::fs;
use std::path::{Path, PathBuf};

/// The files of this name below the output folders of other builds. Cargo gives each of them a folder of its own:
/// `target/<profile>/build/<package>-<hash>/out`, of which `out` is one.
pub fn elsewhere(out: &Path, name: &Path) -> Vec<PathBuf> {
    let folders =
        |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let Some(target) = out.ancestors().nth(4) else { return Vec::new() };
    let package = concat!(env!("CARGO_PKG_NAME"), "-");
    folders(target.into())
        .flat_map(|profile| folders(profile.join("build")))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(package)))
        .map(|path| path.join("out").join(name))
        .filter(|path| path.is_file())
        .collect()
}
