//! How large images are when they are evaluated, and which part of them is looked at.

use std::fmt;
use std::sync::Arc;

use crate::data::packing::PackingSettings;
use crate::data::source::{Image, Source};
use crate::error::{Error, Result};
use crate::recipe::{AspectKind, DropKind, Recipe, ResolutionKind};

/// Size of the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// What the recipe evaluates at.
    Recipe,
    /// An area of R² pixels, R > 0.
    Resolution(usize),
    /// The largest size of which an image, its aspect ratio kept, has at most so many patches (NaViT, appendix D). Prefix
    /// tokens come on top.
    Tokens(usize),
}

/// A size, and what of the images the model sees at it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setting {
    /// Size of the images.
    pub size: Size,
    /// In (0, 1]; below 1 the other patches are dropped at random, as in training.
    pub keep: f64,
    /// In place of the recipe's `eval.crop`.
    pub crop: Option<f64>,
    /// In place of the recipe's `resolution.aspect`.
    pub aspect: Option<AspectKind>,
}

impl Setting {
    /// Every patch at this size.
    pub fn whole(size: Size) -> Self {
        Self { size, keep: 1.0, crop: None, aspect: None }
    }

    /// The recipe that decides how images are seen.
    pub fn applied(&self, recipe: &Recipe) -> Recipe {
        let mut recipe = recipe.clone();
        recipe.eval.crop = self.crop.unwrap_or(recipe.eval.crop);
        recipe.resolution.aspect = self.aspect.unwrap_or(recipe.resolution.aspect);
        recipe
    }

    /// Resolution in pixels that no image exceeds, for the recipe's own size 0.
    pub fn highest(&self, recipe: &Recipe) -> usize {
        match self.size {
            Size::Recipe => 0,
            Size::Resolution(pixels) => pixels,
            // Cutting off remainders, an image of n patches may have the area of nearly 4 n.
            Size::Tokens(patches) => 2 * recipe.model.patch * patches.isqrt().saturating_add(1),
        }
    }

    /// What planning follows.
    ///
    /// # Errors
    /// More tokens than a batch has; a crop that does not go with the aspect.
    pub fn packing(&self, recipe: &Recipe) -> Result<PackingSettings> {
        let recipe = &self.applied(recipe);
        let mut settings = PackingSettings::eval(recipe, self.highest(recipe))?;
        if let Size::Tokens(patches) = self.size {
            let room = settings.capacity() - settings.prefix;
            if patches > room {
                return Err(Error::usage(format!(
                    "--tokens {patches}: a batch has room for {room} patches of an image (packing.tokens = {}, {} prefix \
                     tokens); ask for fewer, or raise it with --set packing.tokens=N",
                    recipe.packing.tokens, settings.prefix
                )));
            }
            settings.limits.patches = settings.limits.patches.min(patches);
            // The native kind bounds the size and does not enlarge.
            settings.resolution.kind = ResolutionKind::Fixed;
        }
        if self.keep < 1.0 {
            settings.drop.kind = DropKind::Constant;
            settings.drop.mean = 1.0 - self.keep;
        }
        Ok(settings)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Recipe => write!(f, "the recipe's resolution"),
            Self::Resolution(pixels) => write!(f, "{pixels} px"),
            Self::Tokens(patches) => write!(f, "{patches} tokens"),
        }
    }
}

/// A central part of an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Crop {
    /// This share, in (0, 1], of height and width: what the usual "resize to a square, central crop" looks at.
    Sides(f64),
    /// A square of this share, in (0, 1], of the shorter side: "resize the shorter side, central crop".
    Square(f64),
}

impl Crop {
    /// Height and width of the part of an image of `size`, at least a pixel.
    fn of(self, (height, width): (usize, usize)) -> (usize, usize) {
        let part = |side: usize, share: f64| ((side as f64 * share).round() as usize).clamp(1, side.max(1));
        match self {
            Self::Sides(share) => (part(height, share), part(width, share)),
            Self::Square(share) => {
                let side = part(height.min(width), share);
                (side, side)
            }
        }
    }

    /// Every image of `source` cropped.
    pub fn apply(self, source: Arc<dyn Source>) -> Arc<dyn Source> {
        Arc::new(Cropped { inner: source, crop: self })
    }
}

struct Cropped {
    inner: Arc<dyn Source>,
    crop: Crop,
}

impl Source for Cropped {
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
        Ok(self.crop.of(self.inner.size(index)?))
    }

    fn load(&self, index: usize, channels: usize) -> Result<Image> {
        let image = self.inner.load(index, channels)?;
        let (height, width) = self.crop.of((image.height, image.width));
        let (top, left) = ((image.height - height) / 2, (image.width - width) / 2);
        let row = |y: usize| {
            let start = ((top + y) * image.width + left) * image.channels;
            &image.pixels[start..start + width * image.channels]
        };
        let pixels = (0..height).flat_map(row).copied().collect();
        Ok(Image { height, width, channels: image.channels, pixels })
    }

    fn caption(&self, index: usize) -> Result<String> {
        self.inner.caption(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::draw::Draw;

    #[test]
    fn crops_are_central() {
        assert_eq!(Crop::Sides(0.5).of((10, 7)), (5, 4));
        assert_eq!(Crop::Square(0.75).of((8, 100)), (6, 6));
        assert_eq!(Crop::Square(1.0).of((8, 5)), (5, 5));
        assert_eq!(Crop::Sides(0.01).of((8, 5)), (1, 1));

        struct One;
        impl Source for One {
            fn len(&self) -> usize {
                1
            }
            fn name(&self, _: usize) -> String {
                "one".into()
            }
            fn label(&self, _: usize) -> usize {
                3
            }
            fn size(&self, _: usize) -> Result<(usize, usize)> {
                Ok((4, 6))
            }
            fn load(&self, _: usize, channels: usize) -> Result<Image> {
                Ok(Image { height: 4, width: 6, channels, pixels: (0..24 * channels as u8).collect() })
            }
        }
        let cropped = Crop::Square(0.5).apply(Arc::new(One));
        assert_eq!((cropped.size(0).unwrap(), cropped.label(0), cropped.len()), ((2, 2), 3, 1));
        let image = cropped.load(0, 3).unwrap();
        assert_eq!((image.height, image.width), (2, 2));
        // Pixels (1, 2), (1, 3), (2, 2), (2, 3) of rows of 6.
        assert_eq!(image.pixels, [24, 25, 26, 27, 28, 29, 42, 43, 44, 45, 46, 47]);
    }

    #[test]
    fn so_many_tokens_and_no_more() {
        let recipe = Recipe::load("digits", &[]).unwrap();
        for patches in [1, 2, 5, 16, 64, 100] {
            let settings = Setting::whole(Size::Tokens(patches)).packing(&recipe).unwrap();
            for size in [(8, 8), (30, 7), (5, 90), (1000, 1001)] {
                let grid = settings.plan(Draw::default(), size).target.grid;
                assert!(grid.patches() <= patches, "{size:?} {patches}: {grid:?}");
                // Another row or column would be too much, up to what rounding an aspect ratio leaves free.
                let longer = grid.patches() + grid.rows + grid.cols + 1;
                assert!(longer > patches || grid.rows.max(grid.cols) >= 16, "{size:?} {patches}: {grid:?}");
            }
            let square = settings.plan(Draw::default(), (50, 50)).target.grid;
            assert_eq!((square.rows, square.cols), (patches.isqrt(), patches.isqrt()));
        }
        let native = Recipe::load("digits", &["resolution.kind=native".into()]).unwrap();
        let settings = Setting::whole(Size::Tokens(64)).packing(&native).unwrap();
        assert_eq!(settings.plan(Draw::default(), (3, 3)).target.grid.patches(), 64, "enlarged");
        let error = Setting::whole(Size::Tokens(4096)).packing(&recipe).unwrap_err().to_string();
        assert!(error.contains("--tokens 4096") && error.contains("packing.tokens = 2048"), "{error}");
        let half = Setting { keep: 0.5, ..Setting::whole(Size::Tokens(64)) }.packing(&recipe).unwrap();
        assert_eq!(half.plan(Draw::default(), (50, 50)).kept, 32);
    }
}
