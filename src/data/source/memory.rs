//! Images held in memory: the built-in digits, IDX and CIFAR files.

use std::sync::Arc;

use super::split::Table;
use super::{Dataset, Image, Source, decode};
use crate::error::Result;

/// An image and where it came from.
pub(super) struct Row {
    pub image: Image,
    pub origin: Arc<str>,
    pub row: usize,
    /// What is said of it, where there is something.
    pub caption: Option<String>,
}

struct InMemory(Vec<(Row, usize)>);

impl Source for InMemory {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn name(&self, index: usize) -> String {
        let row = &self.0[index].0;
        format!("{} image {}", row.origin, row.row)
    }

    fn label(&self, index: usize) -> usize {
        self.0[index].1
    }

    fn size(&self, index: usize) -> Result<(usize, usize)> {
        let image = &self.0[index].0.image;
        Ok((image.height, image.width))
    }

    fn load(&self, index: usize, channels: usize) -> Result<Image> {
        Ok(decode::convert(self.0[index].0.image.clone(), channels))
    }

    fn caption(&self, index: usize) -> Result<String> {
        self.0[index].0.caption.clone().ok_or_else(|| super::no_captions(&self.name(index)))
    }
}

/// `kind` begins the description.
pub(super) fn dataset(table: Table<Row>, kind: &str) -> Dataset {
    Dataset {
        description: format!("{kind}, {}", table.description),
        classes: table.classes,
        train: Arc::new(InMemory(table.train)),
        validation: Arc::new(InMemory(table.validation)),
    }
}
