//! A few images of another source.

use std::sync::Arc;

use super::{Image, Source};
use crate::error::Result;

/// Some images of a source.
pub struct Chosen {
    inner: Arc<dyn Source>,
    indices: Vec<usize>,
    /// Sizes that are known already, in the order of `indices`.
    sizes: Vec<Option<(usize, usize)>>,
}

impl Chosen {
    /// The images at `indices`, in this order.
    pub fn at(inner: Arc<dyn Source>, indices: Vec<usize>) -> Self {
        Self::sized(inner, indices, Vec::new())
    }

    /// The images at `indices`, in this order, with those sizes that are known, so that their headers are not read again.
    pub fn sized(inner: Arc<dyn Source>, indices: Vec<usize>, sizes: Vec<Option<(usize, usize)>>) -> Self {
        Self { inner, indices, sizes }
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
        let known = self.sizes.get(index).copied().flatten();
        known.map_or_else(|| self.inner.size(self.indices[index]), Ok)
    }

    fn load(&self, index: usize, channels: usize) -> Result<Image> {
        self.inner.load(self.indices[index], channels)
    }

    fn caption(&self, index: usize) -> Result<String> {
        self.inner.caption(self.indices[index])
    }
}
