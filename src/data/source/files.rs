//! Image files on disk.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Image, Source, decode};
use crate::error::{Error, Result};

/// Image files with their class indices.
pub struct Files(Vec<(PathBuf, usize)>);

impl Files {
    /// Files of unknown class: every label is 0.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self(paths.into_iter().map(|path| (path, 0)).collect())
    }

    /// Files with their class indices.
    pub(super) fn labelled(files: Vec<(PathBuf, usize)>) -> Self {
        Self(files)
    }

    /// Path of a sample.
    pub fn path(&self, index: usize) -> &Path {
        &self.0[index].0
    }
}

impl Source for Files {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn name(&self, index: usize) -> String {
        self.0[index].0.display().to_string()
    }

    fn label(&self, index: usize) -> usize {
        self.0[index].1
    }

    fn size(&self, index: usize) -> Result<(usize, usize)> {
        let path = &self.0[index].0;
        let metadata = fs::metadata(path).map_err(|e| unreadable(path, e))?;
        if !metadata.is_file() {
            return Err(Error::file(path, "this is no regular file; an image file was expected"));
        }
        let length = metadata.len();
        decode::size_by(&self.name(index), length, |bytes| {
            super::read_at(path, 0, bytes).map_err(|e| unreadable(path, e))
        })
    }

    fn load(&self, index: usize, channels: usize) -> Result<Image> {
        let path = &self.0[index].0;
        let bytes = fs::read(path).map_err(|e| unreadable(path, e))?;
        decode::decode(&bytes, &self.name(index), channels)
    }

    /// The file beside the image with the extension `txt`.
    fn caption(&self, index: usize) -> Result<String> {
        let path = self.0[index].0.with_extension("txt");
        match fs::read(&path) {
            Ok(bytes) => super::caption_of(&path.display().to_string(), bytes),
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Err(Error::usage(format!(
                "{}: there is no text; put it into {} beside the image",
                self.name(index),
                path.display()
            ))),
            Err(cause) => Err(Error::file(&path, format!("the text cannot be read ({cause})"))),
        }
    }
}

fn unreadable(path: &Path, cause: std::io::Error) -> Error {
    Error::file(path, format!("the image cannot be read ({cause})"))
}
