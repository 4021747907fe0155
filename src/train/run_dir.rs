//! The folder of a run: `runs/<name>-<n>/`.
//!
//! | file | content |
//! |---|---|
//! | `recipe.toml` | the resolved recipe |
//! | `last.safetensors` | the latest checkpoint, with everything that resuming needs |
//! | `best.safetensors`, `step-N.safetensors` | models without optimiser state |
//! | `*.safetensors.index.json` | in the place of such a file, the index of those of all ranks |
//! | `metrics.jsonl`, `events.out.tfevents.*` | metrics |
//! | `.lock` | held while a process trains here |

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use crate::files::{remove_temporaries, sync_folder, write_atomic};
use crate::weights::Tensors;
use crate::weights::sharded::remove_strays;
use crate::{Error, Result};

/// A run's folder, held by this process alone.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// None where another rank of the run holds it.
    _lock: Option<File>,
}

impl RunDir {
    /// Makes `<root>/<name>-<n>` with the first `n` above every existing one, and writes the
    /// recipe into it.
    ///
    /// # Errors
    /// [`Error::Usage`] if `name` cannot name a folder or no folder can be made there;
    /// [`Error::Failure`] if it cannot be written to. No folder is left behind.
    pub fn create(root: &Path, name: &str, recipe: &str) -> Result<Self> {
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
            return Err(Error::usage(format_args!(
                "the run name {name:?} cannot name a folder, use letters, digits and dashes"
            )));
        }
        let unusable = |path: &Path, cause: io::Error| {
            Error::file(
                path,
                format_args!("no run folder can be made here ({cause}); choose another with --out"),
            )
        };
        if root.exists() && !root.is_dir() {
            return Err(Error::file(
                root,
                "is a file, expected a folder for runs; choose another with --out",
            ));
        }
        fs::create_dir_all(root).map_err(|cause| unusable(root, cause))?;
        let mut number = 1 + highest(root, name).map_err(|cause| unusable(root, cause))?;
        let path = loop {
            let path = root.join(format!("{name}-{number}"));
            // Creation fails if the folder exists, so two processes never share a number.
            match fs::create_dir(&path) {
                Ok(()) => break path,
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(cause) => return Err(unusable(&path, cause)),
            }
        };
        Self::fill(&path, root, recipe).inspect_err(|_| drop(fs::remove_dir_all(&path)))
    }

    fn fill(path: &Path, root: &Path, recipe: &str) -> Result<Self> {
        let run = Self { _lock: Some(lock(path)?), path: path.into() };
        write_atomic(&run.recipe(), |out| out.write_all(recipe.as_bytes()))?;
        sync_folder(root).map_err(|cause| Error::io(root, cause))?;
        Ok(run)
    }

    /// Removes the folder of a run that has come to nothing.
    pub fn discard(&self) {
        // What cannot be removed is harmless; the error that ended the run is what matters.
        let _ = fs::remove_dir_all(&self.path);
    }

    /// Takes over a run in order to resume it, and clears what a killed process left half-written.
    ///
    /// # Errors
    /// [`Error::Usage`] if `path` is no run, has no checkpoint yet, or another process trains in
    /// it; [`Error::Failure`] if it cannot be written to.
    pub fn resume(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Err(Error::file(path, "is a file, expected the folder of a run, such as runs/digits-1"));
        }
        if !path.is_dir() {
            return Err(Error::file(
                path,
                "there is no such folder, expected that of a run, such as runs/digits-1",
            ));
        }
        let last = path.join(LAST);
        if !Tensors::exist(&last) {
            return Err(Error::file(
                path,
                format_args!("holds no {LAST}, so there is nothing to resume; start a new run"),
            ));
        }
        let run = Self { _lock: Some(lock(path)?), path: path.into() };
        remove_temporaries(path)?;
        remove_strays(path)?;
        Ok(run)
    }

    /// The folder that the first of several ranks holds, for the others, which only read it.
    pub fn of_first_rank(path: &Path) -> Self {
        Self { path: path.into(), _lock: None }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The resolved recipe.
    pub fn recipe(&self) -> PathBuf {
        self.path.join("recipe.toml")
    }

    /// The checkpoint to resume from.
    pub fn last(&self) -> PathBuf {
        self.path.join(LAST)
    }

    /// The best model so far.
    pub fn best(&self) -> PathBuf {
        self.path.join("best.safetensors")
    }

    /// The model that is kept of `step`.
    pub fn step(&self, step: u64) -> PathBuf {
        self.path.join(format!("step-{step}.safetensors"))
    }

    /// The metric lines.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }
}

const LAST: &str = "last.safetensors";

/// The model file that `path` stands for: itself, or of a run's folder the best model, or the
/// last where there is no best.
///
/// # Errors
/// [`Error::Usage`] if there is none.
pub fn model_file(path: &Path) -> Result<PathBuf> {
    if !path.exists() && !Tensors::exist(path) {
        return Err(Error::file(path, "there is no such checkpoint or run folder"));
    }
    if !path.is_dir() {
        return Ok(path.into());
    }
    ["best.safetensors", LAST]
        .iter()
        .map(|name| path.join(name))
        .find(|file| Tensors::exist(file))
        .ok_or_else(|| {
            Error::file(
                path,
                format_args!(
                    "holds neither best.safetensors nor {LAST}, expected a model file or the folder of a run"
                ),
            )
        })
}

/// The highest number of a folder `<name>-<n>`; 0 without one.
fn highest(root: &Path, name: &str) -> io::Result<u64> {
    let mut highest = 0;
    for entry in fs::read_dir(root)? {
        let file_name = entry?.file_name();
        let number = file_name
            .to_str()
            .and_then(|text| text.strip_prefix(name)?.strip_prefix('-')?.parse::<u32>().ok());
        highest = highest.max(number.map_or(0, u64::from));
    }
    Ok(highest)
}

/// The lock ends with the process, however it ends.
fn lock(path: &Path) -> Result<File> {
    let lock = path.join(".lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock)
        .map_err(|cause| Error::io(&lock, cause))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            Err(Error::file(path, "another process is training in this run; wait for it or stop it first"))
        }
        Err(TryLockError::Error(cause)) if cause.kind() != io::ErrorKind::Unsupported => {
            Err(Error::write(&lock, cause))
        }
        // Some network file systems have no locks; training goes on without.
        _ => Ok(file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_rise_and_are_not_reused() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("deep/runs");
        let name = |run: &RunDir| run.path().file_name().unwrap().to_str().unwrap().to_owned();
        let first = RunDir::create(&root, "digits", "seed = 1").unwrap();
        assert_eq!(name(&first), "digits-1");
        assert_eq!(fs::read_to_string(first.recipe()).unwrap(), "seed = 1");
        assert_eq!(name(&RunDir::create(&root, "digits", "").unwrap()), "digits-2");
        fs::create_dir(root.join("digits-7")).unwrap();
        fs::create_dir(root.join("digits-large-9")).unwrap();
        fs::remove_dir_all(first.path()).unwrap();
        assert_eq!(name(&RunDir::create(&root, "digits", "").unwrap()), "digits-8");
        assert_eq!(name(&RunDir::create(&root, "other", "").unwrap()), "other-1");
    }

    #[test]
    fn runs_started_at_once_get_their_own_folders() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| RunDir::create(dir.path(), "a", "").unwrap().path().to_owned()))
                .collect();
            handles.into_iter().map(|h| h.join().unwrap()).collect()
        });
        assert_eq!(paths.iter().collect::<std::collections::BTreeSet<_>>().len(), 8);
    }

    #[test]
    fn resuming() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(dir.path(), "a", "").unwrap();
        let path = run.path().to_owned();
        let message = |path: &Path| RunDir::resume(path).unwrap_err().to_string();
        assert!(message(&path).contains("nothing to resume"));
        fs::write(run.last(), "").unwrap();
        assert!(message(&path).contains("another process is training"), "{}", message(&path));
        fs::write(path.join(".last.safetensors.1-0.trencadis-tmp"), "").unwrap();
        drop(run);
        assert_eq!(RunDir::resume(&path).unwrap().last(), path.join("last.safetensors"));
        assert!(!path.join(".last.safetensors.1-0.trencadis-tmp").exists());
        assert!(message(&path.join("last.safetensors")).contains("is a file"));
        assert!(message(&path.join("absent")).contains("no such folder"));
    }

    #[test]
    fn bad_names_and_places() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["", "a/b", "..", "a\\b"] {
            assert_eq!(RunDir::create(dir.path(), name, "").unwrap_err().exit_code(), 2, "{name}");
        }
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = RunDir::create(&file, "a", "").unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("is a file"), "{error}");
    }

    #[test]
    fn a_run_stands_for_its_best_model() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(dir.path(), "a", "").unwrap();
        assert!(model_file(run.path()).unwrap_err().to_string().contains("neither"));
        fs::write(run.last(), "").unwrap();
        assert_eq!(model_file(run.path()).unwrap(), run.last());
        fs::write(run.best(), "").unwrap();
        assert_eq!(model_file(run.path()).unwrap(), run.best());
        assert_eq!(model_file(&run.last()).unwrap(), run.last());
    }
}
