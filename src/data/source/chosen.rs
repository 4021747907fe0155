//! A few images of another source.

use std::sync::Arc;

use super::{Image, Source};
use crate::error::Result;

/// Some images of a source.
pub struct Chosen {
    inner: Arc<dyn Source>,
    indices: Vec<usize>,
}

impl Chosen {
    /// The images at `indices`, in this order.
    pub fn at(inner: Arc<dyn Source>, indices: Vec<usize>) -> Self {
        Self { inner, indices }
    }

    /// `count` of the images, evenly spread, or all where there are fewer: of one source always the same.
    pub fn spread(inner: Arc<dyn Source>, count: usize) -> Self {
        let count = count.min(inner.len());
        let indices = (0..count).map(|i| i * inner.len() / count).collect();
        Self::at(inner, indices)
    }
}

impl Source for Chosen {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(self.indices[index])
    }

    fn label(&self, index: usize) -> usize {
        self.inner.label(self.indices[index])
    }

    fn size(&self, index: usize) -> Result<(usize, usize)> {
        self.inner.size(self.indices[index])
    }

    fn load(&self, index: usize, channels: usize) -> Result<Image> {
        self.inner.load(self.indices[index], channels)
    }

    fn caption(&self, index: usize) -> Result<String> {
        self.inner.caption(self.indices[index])
    }
}
