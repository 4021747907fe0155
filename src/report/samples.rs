//! What a model says of a few images of its validation set.

use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{DynamicImage, ImageFormat, imageops::FilterType};

use crate::data::loader::Loader;
use crate::data::source::chosen::Chosen;
use crate::data::source::{self, Image, Source};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::metrics::probability::probabilities;
use crate::eval::open::Told;
use crate::eval::predict::{Scored, ranked};
use crate::eval::trained::Trained;
use crate::train::run_dir::model_file;

/// Classes named of an image.
const TOP: usize = 3;
/// Longest side of a picture on the page, in pixels.
const SIDE: u32 = 240;
/// Up to this longest side a picture is a PNG and shown with its pixels.
const SMALL: usize = 64;

/// An image with the classes that a model takes it for.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The image's name in its set.
    pub name: String,
    /// Its class.
    pub label: String,
    /// Most probable first.
    pub top: Vec<Scored>,
    /// The picture as a data URI.
    pub picture: String,
    /// Whether it is so small that its pixels should be seen.
    pub small: bool,
}

impl Sample {
    /// Whether the most probable class is that of the image.
    pub fn is_right(&self) -> bool {
        self.top.first().is_some_and(|first| first.class == self.label)
    }
}

/// Runs the best model of the run at `path` (else the last) over `count` images of its validation set, evenly spread: runs
/// over the same set show the same images. None where no model has been saved yet, or it knows no classes. Images that cannot be read are left out.
///
/// # Errors
/// A damaged model; data that are no longer where the recipe says.
pub fn samples(path: &Path, count: usize, device: Option<&Device>) -> Result<Vec<Sample>> {
    if count == 0 || model_file(path).is_err() {
        return Ok(Vec::new());
    }
    let mut trained = Trained::load(path, &Told::default(), device, 0)?;
    if trained.model.classes() == 0 {
        return Ok(Vec::new());
    }
    let mut recipe = trained.recipe.clone();
    let set = source::of_recipe(&recipe)
        .map_err(|cause| Error::usage(format!("{cause}; or leave the predictions out with --samples 0")))?;
    let images = set.match_classes(&trained.classes)?;
    if images.is_empty() {
        return Ok(Vec::new());
    }
    let chosen: Arc<dyn Source> = Arc::new(Chosen::spread(images, count));
    recipe.data.max_unreadable = 1.0;
    let mut found: Vec<Option<Sample>> = vec![None; chosen.len()];
    let mut loader = Loader::eval(chosen.clone(), &recipe, 0)?;
    while let Some(loaded) = loader.next().transpose()? {
        let batch = &loaded.batch;
        if batch.images == 0 {
            continue;
        }
        let classes = trained.classes.len();
        let logits = trained.model.logits(batch)?;
        for slot in (0..batch.images).filter(|slot| batch.weights[*slot] > 0.0) {
            let index = batch.sample_ids[slot] as usize;
            let probabilities = probabilities(&logits[slot * classes..][..classes], recipe.train.loss);
            let image = chosen.load(index, recipe.model.channels)?;
            found[index] = Some(Sample {
                name: chosen.name(index),
                label: trained.classes[chosen.label(index)].clone(),
                top: ranked(&probabilities, &trained.classes, TOP),
                small: image.height.max(image.width) <= SMALL,
                picture: data_uri(image)?,
            });
        }
    }
    Ok(found.into_iter().flatten().collect())
}

/// A small image as a PNG, a larger one scaled down as a JPEG.
fn data_uri(image: Image) -> Result<String> {
    let (width, height) = (image.width as u32, image.height as u32);
    let picture = match image.channels {
        1 => image::GrayImage::from_raw(width, height, image.pixels).map(DynamicImage::ImageLuma8),
        _ => image::RgbImage::from_raw(width, height, image.pixels).map(DynamicImage::ImageRgb8),
    };
    let mut picture = picture.ok_or_else(|| Error::failure("an image has another size than its pixels"))?;
    let (format, mime) = match width.max(height) as usize {
        0..=SMALL => (ImageFormat::Png, "png"),
        _ => (ImageFormat::Jpeg, "jpeg"),
    };
    if width.max(height) > SIDE {
        picture = picture.resize(SIDE, SIDE, FilterType::CatmullRom);
    }
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).map_err(Error::failure)?;
    Ok(format!("data:image/{mime};base64,{}", STANDARD.encode(bytes.get_ref())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_within_the_page() {
        let of = |side: usize, channels: usize| {
            let pixels = (0..side * side * channels).map(|i| (i % 251) as u8).collect();
            data_uri(Image { height: side, width: side, channels, pixels }).unwrap()
        };
        let decode = |uri: &str| {
            let bytes = STANDARD.decode(uri.split_once(',').unwrap().1).unwrap();
            image::load_from_memory(&bytes).unwrap()
        };
        let small = of(8, 1);
        assert!(small.starts_with("data:image/png;base64,"));
        assert_eq!(decode(&small).into_luma8().into_raw(), (0..64).collect::<Vec<u8>>());
        let large = of(500, 3);
        assert!(large.starts_with("data:image/jpeg;base64,"));
        assert_eq!(decode(&large).width(), SIDE);
    }
}
