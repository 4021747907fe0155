//! Output files that are whole or absent.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Ending of the temporary files of [`write_atomic`]; one that a killed process left behind may
/// be deleted (see [`remove_temporaries`]).
const TEMPORARY: &str = ".trencadis-tmp";

/// Writes `path` through `write` so that, whenever the process is killed or the power fails,
/// the path holds either its old content or all of the new one: a temporary file in the same
/// folder is written, synced and renamed over `path`, then the folder is synced.
///
/// A path that is a device or a pipe is written directly, since a rename would replace it.
///
/// # Errors
/// [`Error::Failure`] naming `path`, if anything cannot be written. The temporary file is removed.
pub fn write_atomic(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    write(&mut file).map_err(|cause| Error::io(path, cause))?;
    file.commit()
}

/// A file that is written piece by piece, and takes its place as [`write_atomic`] says once it is whole. Dropped
/// before, it leaves nothing.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    writer: BufWriter<File>,
    /// None where the path is written directly, and once the file has taken its place.
    temporary: Option<PathBuf>,
}

impl AtomicFile {
    /// Begins to write `path`.
    ///
    /// # Errors
    /// [`Error::Failure`] naming `path`, if nothing can be written there.
    pub fn create(path: &Path) -> Result<Self> {
        let fail = |cause: io::Error| Error::io(path, cause);
        let opened = |file: File, temporary: Option<PathBuf>| Self {
            path: path.into(),
            writer: BufWriter::with_capacity(1 << 20, file),
            temporary,
        };
        match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => {
                return Err(Error::file(path, "is a folder, expected a file to write"));
            }
            Ok(meta) if !meta.is_file() => {
                return OpenOptions::new()
                    .write(true)
                    .open(path)
                    .map(|file| opened(file, None))
                    .map_err(fail);
            }
            _ => {}
        }
        let folder = folder_of(path);
        let Some(name) = path.file_name() else { return Err(Error::file(path, "names no file to write")) };
        if !folder.is_dir() {
            let folder = folder.display();
            return Err(Error::file(path, format_args!("cannot be written: {folder} is not a folder")));
        }

        // Unique within and between processes, so that two writers never share a temporary file.
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}-{number}{TEMPORARY}", std::process::id()));
        let temporary = folder.join(hidden);
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&temporary);
        file.map(|file| opened(file, Some(temporary))).map_err(fail)
    }

    /// The path that is written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until what was written so far is on the disk.
    ///
    /// # Errors
    /// [`Error::Failure`] naming the path.
    pub fn sync(&mut self) -> Result<()> {
        let synced = match self.temporary {
            Some(_) => self.writer.flush().and_then(|()| self.writer.get_ref().sync_data()),
            None => Ok(()),
        };
        synced.map_err(|cause| Error::io(&self.path, cause))
    }

    /// Syncs what was written, renames it over the path and syncs the folder.
    ///
    /// # Errors
    /// [`Error::Failure`] naming the path, which then is as it was.
    pub fn commit(mut self) -> Result<()> {
        let fail = |cause: io::Error| Error::io(&self.path, cause);
        self.writer.flush().map_err(fail)?;
        let Some(temporary) = &self.temporary else { return Ok(()) };
        self.writer.get_ref().sync_all().and_then(|()| fs::rename(temporary, &self.path)).map_err(fail)?;
        self.temporary = None;
        sync_folder(&folder_of(&self.path)).map_err(|cause| Error::io(&self.path, cause))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // Best effort: what has failed before is what is reported.
            let _ = fs::remove_file(temporary);
        }
    }
}

/// Deletes what killed writers left in `folder`. Only for a folder in which nobody else writes.
///
/// # Errors
/// [`Error::Failure`] if the folder cannot be listed or a file cannot be deleted.
pub fn remove_temporaries(folder: &Path) -> Result<()> {
    let fail = |cause: io::Error| Error::io(folder, cause);
    for entry in fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') && name.ends_with(TEMPORARY) {
            fs::remove_file(entry.path()).map_err(fail)?;
        }
    }
    Ok(())
}

/// The folder that holds `path`; the current one for a bare name.
fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_path_buf(),
        None => PathBuf::from("/"),
    }
}

/// Makes a rename or a creation in `folder` survive a power failure.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    // Only Unix can open a folder as a file; elsewhere the rename is as durable as it gets.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_the_whole_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        for text in ["a longer first text", "second"] {
            write_atomic(&path, |w| w.write_all(text.as_bytes())).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn a_failed_write_keeps_the_old_content_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "old").unwrap();
        let error = write_atomic(&path, |w| {
            w.write_all(b"half")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        })
        .unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().starts_with(&format!("cannot write {}: ", path.display())), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn impossible_places_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.join("below"), dir.path().join("absent/a"), dir.path().to_path_buf()] {
            let error = write_atomic(&path, |w| w.write_all(b"x")).unwrap_err();
            assert!(error.to_string().contains("folder"), "{error}");
        }
        assert_eq!(names(dir.path()), ["file"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_device_is_an_error_and_stays_a_device() {
        let path = Path::new("/dev/full");
        let error = write_atomic(path, |w| w.write_all(b"x")).unwrap_err();
        assert!(error.to_string().contains("the disk is full (No space left"), "{error}");
        assert_eq!(error.exit_code(), 2);
        assert!(!fs::metadata(path).unwrap().is_file());
    }

    #[test]
    fn leftovers_are_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".last.7-0.trencadis-tmp", ".lock", "x.trencadis-tmp", "last.safetensors"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        remove_temporaries(dir.path()).unwrap();
        assert_eq!(names(dir.path()), [".lock", "last.safetensors", "x.trencadis-tmp"]);
    }
}
