//! An in-memory source of images of any shape, for the tests of packing and loading.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use trencadis::data::source::{Image, Source};
use trencadis::{Error, Result};

/// Images with log-uniform aspect ratio; every pixel is a function of sample, row and column.
pub struct Synthetic {
    sizes: Vec<(usize, usize)>,
    /// Samples whose size cannot be read.
    pub bad_sizes: Vec<usize>,
    /// Samples that cannot be decoded.
    pub bad_pixels: Vec<usize>,
    /// Samples whose decoder panics.
    pub panicking: Vec<usize>,
    /// Once set, nothing can be decoded any more.
    pub gone: Arc<AtomicBool>,
}

impl Synthetic {
    /// `samples` images of about 100×100 pixels with height/width in `narrow..wide`.
    pub fn new(samples: usize, narrow: f64, wide: f64) -> Self {
        let sizes = (0..samples)
            .map(|i| {
                // A low-discrepancy sequence; the golden ratio keeps neighbours apart.
                let share = (i as f64 * 0.618_033_988_749_895).fract();
                let aspect = (narrow.ln() + share * (wide / narrow).ln()).exp();
                let side = 60.0 + 80.0 * (i as f64 * 0.414_213_562_373_095).fract();
                ((side * aspect.sqrt()).round() as usize, (side / aspect.sqrt()).round() as usize)
            })
            .collect();
        Self {
            sizes,
            bad_sizes: Vec::new(),
            bad_pixels: Vec::new(),
            panicking: Vec::new(),
            gone: Arc::default(),
        }
    }

    /// The images' sizes are given.
    pub fn with_sizes(sizes: Vec<(usize, usize)>) -> Self {
        Self { sizes, ..Self::new(0, 1.0, 1.0) }
    }
}

/// The value of a pixel.
pub fn pixel(sample: usize, y: usize, x: usize, channel: usize) -> u8 {
    (sample.wrapping_mul(37) + y * 3 + x * 5 + channel * 85) as u8
}

impl Source for Synthetic {
    fn len(&self) -> usize {
        self.sizes.len()
    }

    fn name(&self, index: usize) -> String {
        format!("synthetic-{index}")
    }

    fn label(&self, index: usize) -> usize {
        index % 10
    }

    fn size(&self, index: usize) -> Result<(usize, usize)> {
        if self.bad_sizes.contains(&index) {
            return Err(Error::usage(format!("synthetic-{index}: broken header")));
        }
        Ok(self.sizes[index])
    }

    fn load(&self, index: usize, channels: usize) -> Result<Image> {
        if self.bad_pixels.contains(&index) || self.gone.load(Ordering::Relaxed) {
            return Err(Error::usage(format!("synthetic-{index}: broken pixels")));
        }
        assert!(!self.panicking.contains(&index), "a decoder that panics");
        let (height, width) = self.sizes[index];
        let pixels = (0..height * width * channels)
            .map(|i| pixel(index, i / channels / width, i / channels % width, i % channels))
            .collect();
        Ok(Image { height, width, channels, pixels })
    }
}
