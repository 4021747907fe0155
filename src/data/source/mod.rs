//! Where images come from: one trait, one file per kind of source.

use crate::error::Result;

/// A decoded image: rows from the top, interleaved channels, 8 bits each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Pixel rows.
    pub height: usize,
    /// Pixel columns.
    pub width: usize,
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// `[height, width, channels]`.
    pub pixels: Vec<u8>,
}

/// A labelled set of images with random access. Implementations are cheap to ask for labels and
/// sizes and may be called from many threads.
pub trait Source: Send + Sync {
    /// Number of samples.
    fn len(&self) -> usize;

    /// Whether there are no samples.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What a message calls the sample: a path, or a path and a member or row.
    fn name(&self, index: usize) -> String;

    /// Class index.
    fn label(&self, index: usize) -> usize;

    /// (height, width) as [`Source::load`] will return it, EXIF orientation applied, read from the header.
    fn size(&self, index: usize) -> Result<(usize, usize)>;

    /// Decodes the sample to `channels` (1 or 3).
    fn load(&self, index: usize, channels: usize) -> Result<Image>;
}

/// Training and validation images with the names of their classes.
pub struct Dataset {
    /// Class names; a label is an index into them.
    pub classes: Vec<String>,
    /// Training images.
    pub train: std::sync::Arc<dyn Source>,
    /// Validation images.
    pub validation: std::sync::Arc<dyn Source>,
}
