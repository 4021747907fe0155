//! Compiled kernels are kept once for all profiles and features of a checkout, by what they are made of.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

/// A kept result: the fatbin and, beside it, the seconds that the compiler took.
pub struct Entry {
    fatbin: PathBuf,
    seconds: PathBuf,
}

impl Entry {
    /// Where the result of compiling `unit` is kept. Its name is a hash of the text, of every file of the folder
    /// `include` that it includes by `#include "..."`, and of `salt`: the flags and the compiler's version.
    pub fn new(out_dir: &Path, stem: &str, unit: &str, include: &Path, salt: &[String]) -> io::Result<Self> {
        let mut hasher = DefaultHasher::new();
        (unit, salt).hash(&mut hasher);
        hash_included(unit, include, include, &mut BTreeSet::new(), &mut hasher)?;
        let folder = folder(out_dir);
        fs::create_dir_all(&folder)?;
        let path = |ending: &str| folder.join(format!("{stem}-{:016x}.{ending}", hasher.finish()));
        Ok(Self { fatbin: path("fatbin"), seconds: path("seconds") })
    }

    /// Copies the result to `to` and returns the seconds that it took; `None` where nothing is kept.
    pub fn take(&self, to: &Path) -> io::Result<Option<f64>> {
        let Some(seconds) = fs::read_to_string(&self.seconds).ok().and_then(|s| s.trim().parse().ok()) else {
            return Ok(None);
        };
        match fs::copy(&self.fatbin, to) {
            Ok(_) => Ok(Some(seconds)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps the result `from`. The seconds come last: without them there is nothing.
    pub fn keep(&self, from: &Path, took: Duration) -> io::Result<()> {
        // Another build may write the same: whole files move in.
        let part = |path: &Path| path.with_extension(format!("{}.part", std::process::id()));
        let (fatbin, seconds) = (part(&self.fatbin), part(&self.seconds));
        fs::copy(from, &fatbin)?;
        fs::rename(fatbin, &self.fatbin)?;
        fs::write(&seconds, format!("{:.1}\n", took.as_secs_f64()))?;
        fs::rename(seconds, &self.seconds)
    }
}

/// `target/kernels`, where `out_dir` is `target/<profile>/build/<package>/out`.
fn folder(out_dir: &Path) -> PathBuf {
    let target = out_dir.ancestors().find(|a| a.ends_with("build")).and_then(|build| build.parent()?.parent());
    target.unwrap_or(out_dir).join("kernels")
}

fn hash_included(
    text: &str,
    beside: &Path,
    include: &Path,
    seen: &mut BTreeSet<PathBuf>,
    hasher: &mut DefaultHasher,
) -> io::Result<()> {
    for line in text.lines() {
        let Some(rest) = line.trim_start().strip_prefix("#include \"") else { continue };
        let name = rest.split('"').next().unwrap_or(rest);
        // nvcc never sees the emulator.
        if name.contains("emulator/") {
            continue;
        }
        let path = [beside, include].map(|f| f.join(name)).into_iter().find(|p| p.is_file());
        let Some(path) = path else { continue };
        let path = path.canonicalize()?;
        if seen.insert(path.clone()) {
            let text = fs::read_to_string(&path)?;
            (name, &text).hash(hasher);
            hash_included(&text, path.parent().unwrap_or(include), include, seen, hasher)?;
        }
    }
    Ok(())
}
