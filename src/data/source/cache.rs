//! Decoded images kept in memory, up to a budget.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::{Image, Source, decode};
use crate::error::Result;

/// Bytes that several [`Cached`] sources may fill together.
#[derive(Debug)]
pub struct Budget(AtomicUsize);

impl Budget {
    /// A budget of `bytes`.
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(bytes)))
    }

    /// Bytes not yet taken.
    pub fn left(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A source that keeps the images it has decoded. First come, first kept: every epoch visits every
/// image once, so that an image is as likely to be asked for again as any other, and evicting
/// (least recently used would evict just what comes next) can only lose.
pub struct Cached {
    inner: Arc<dyn Source>,
    slots: Vec<OnceLock<Image>>,
    budget: Arc<Budget>,
}

impl Cached {
    /// Wraps `inner`; decoded pixels count against `budget`.
    pub fn new(inner: Arc<dyn Source>, budget: Arc<Budget>) -> Self {
        let slots = (0..inner.len()).map(|_| OnceLock::new()).collect();
        Self { inner, slots, budget }
    }
}

impl Source for Cached {
    fn len(&self) -> usize {
        self.inner.len()
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(index)
    }

    fn label(&self, index: usize) -> usize {
        self.inner.label(index)
    }

    fn size(&self, index: usize) -> Result<(usize, usize)> {
        match self.slots[index].get() {
            Some(image) => Ok((image.height, image.width)),
            None => self.inner.size(index),
        }
    }

    fn load(&self, index: usize, channels: usize) -> Result<Image> {
        if let Some(image) = self.slots[index].get() {
            // Grey may have been made from colour, but never the other way round.
            if image.channels >= channels {
                return Ok(decode::convert(image.clone(), channels));
            }
            return self.inner.load(index, channels);
        }
        let image = self.inner.load(index, channels)?;
        let bytes = image.pixels.len();
        // A second thread may have decoded the same image meanwhile; then its copy stays.
        if self.budget.take(bytes) && self.slots[index].set(image.clone()).is_err() {
            self.budget.give_back(bytes);
        }
        Ok(image)
    }

    fn caption(&self, index: usize) -> Result<String> {
        self.inner.caption(index)
    }
}
