//! Where images come from: one trait, one file per kind of source.

pub mod cache;
pub mod chosen;
mod cifar;
pub mod decode;
mod digits;
pub mod files;
mod folder;
mod idx;
mod members;
mod memory;
mod shards;
mod split;
mod tar;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use split::Split;

use crate::error::{Error, Result};
use crate::hash::Fnv1a;
use crate::recipe::{DataConfig, Recipe, SourceKind};

/// Class of the images that have a text and no class.
const CAPTIONED: &str = "image";
/// Unknown classes that an error names.
const NAMED: usize = 5;

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

impl Image {
    /// Red, green and blue of the pixel in column `x` of row `y`.
    pub fn colour(&self, x: usize, y: usize) -> [u8; 3] {
        let pixel = &self.pixels[(y * self.width + x) * self.channels..][..self.channels];
        std::array::from_fn(|channel| pixel[channel % self.channels])
    }
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

    /// (height, width) as [`Source::load`] will return it, EXIF orientation applied, read from the
    /// header. An error begins with the sample's name.
    fn size(&self, index: usize) -> Result<(usize, usize)>;

    /// Decodes the sample to `channels` (1 or 3). An error begins with the sample's name.
    fn load(&self, index: usize, channels: usize) -> Result<Image>;

    /// The text of the sample. An error begins with the sample's name.
    fn caption(&self, index: usize) -> Result<String> {
        Err(no_captions(&self.name(index)))
    }
}

/// Training and validation images with the names of their classes.
pub struct Dataset {
    /// Class names; a label is an index into them.
    pub classes: Vec<String>,
    /// Training images.
    pub train: Arc<dyn Source>,
    /// Validation images.
    pub validation: Arc<dyn Source>,
    /// What the path was taken for and where the validation images come from, such as `class folders,
    /// validation: automatic split of 20 %, seed 0`.
    pub description: String,
}

impl Dataset {
    /// The validation images with labels that index `model_classes`, matched by name.
    ///
    /// # Errors
    /// If an image belongs to a class that the model does not know.
    pub fn match_classes(&self, model_classes: &[String]) -> Result<Arc<dyn Source>> {
        if self.classes == model_classes {
            return Ok(self.validation.clone());
        }
        let numbers: HashMap<&str, usize> =
            model_classes.iter().enumerate().map(|(number, name)| (name.as_str(), number)).collect();
        let to_model: Vec<Option<usize>> =
            self.classes.iter().map(|name| numbers.get(name.as_str()).copied()).collect();
        let (mut labels, mut unknown) = (Vec::with_capacity(self.validation.len()), BTreeSet::new());
        for index in 0..self.validation.len() {
            let label = self.validation.label(index);
            match to_model.get(label) {
                Some(Some(number)) => labels.push(*number),
                _ => {
                    unknown.insert(label);
                }
            }
        }
        if unknown.is_empty() {
            return Ok(Arc::new(Relabelled { inner: self.validation.clone(), labels }));
        }
        let names: Vec<_> = unknown
            .iter()
            .take(NAMED)
            .map(|label| {
                self.classes.get(*label).map_or_else(|| label.to_string(), |name| format!("`{name}`"))
            })
            .collect();
        let more = if unknown.len() > NAMED { ", ..." } else { "" };
        Err(Error::usage(format!(
            "the data has {} that the model was not trained on: {}{more}; the model's {} classes begin with \
             `{}`; rename or remove them",
            if unknown.len() == 1 { "a class".into() } else { format!("{} classes", unknown.len()) },
            names.join(", "),
            model_classes.len(),
            model_classes.first().map_or("", String::as_str)
        )))
    }
}

/// A source whose labels are those of another table of classes.
struct Relabelled {
    inner: Arc<dyn Source>,
    labels: Vec<usize>,
}

impl Source for Relabelled {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(index)
    }

    fn label(&self, index: usize) -> usize {
        self.labels[index]
    }

    fn size(&self, index: usize) -> Result<(usize, usize)> {
        self.inner.size(index)
    }

    fn load(&self, index: usize, channels: usize) -> Result<Image> {
        self.inner.load(index, channels)
    }

    fn caption(&self, index: usize) -> Result<String> {
        self.inner.caption(index)
    }
}

fn no_captions(name: &str) -> Error {
    Error::usage(format!(
        "{name}: data of this kind have no texts; train on class folders or tar shards with a .txt for each image"
    ))
}

/// The text that `name`'s caption holds.
fn caption_of(name: &str, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| {
        Error::usage(format!("{name}: the text is not valid UTF-8; write it in UTF-8, or remove the image"))
    })
}

/// FNV-1a over base name and label of every sample in order: the same for a set that moved to
/// another folder, another one where images were added, removed, renamed or changed their class.
pub fn fingerprint(source: &dyn Source) -> u64 {
    let mut hash = Fnv1a::default();
    for index in 0..source.len() {
        let name = source.name(index);
        hash.add(name.rsplit('/').next().unwrap_or_default().as_bytes());
        hash.add(&[0]);
        hash.add(&(source.label(index) as u64).to_le_bytes());
    }
    hash.value()
}

/// Opens the set that `config` names. `channels` (1 or 3) is what images will be loaded with;
/// `seed` decides the automatic train/validation split.
///
/// [`SourceKind::Auto`] looks at `config.path`: the built-in digits where it is empty; tar shards
/// for a `.tar` file, a pattern with braces, or a folder that holds `.tar` files; IDX for a folder
/// with `*-images-idx3-ubyte(.gz)`; CIFAR for one with `data_batch_1.bin` or `train.bin`; else class
/// folders. Images from folders and tar files are kept in memory up to `config.cache_mib`, which
/// training and validation share; the other sources are in memory anyway.
///
/// A folder that holds both tar files with images and class folders is refused under `auto`.
pub fn open(config: &DataConfig, channels: usize, seed: u64) -> Result<Dataset> {
    open_split(config, channels, Split::Train { share: config.validation, seed }, false)
}

/// The set that a run of `recipe` is on. Where images are learned from texts, `.txt` files are these, and images need no
/// class: those without one are all of one.
///
/// # Errors
/// As for [`open`].
pub fn of_recipe(recipe: &Recipe) -> Result<Dataset> {
    let split = Split::Train { share: recipe.data.validation, seed: recipe.train.seed };
    open_split(&recipe.data, recipe.model.channels, split, recipe.text.is_on())
}

/// The set that a model of `recipe` is evaluated on and that it was not trained on, see [`open_for_eval`].
///
/// # Errors
/// As for [`open`].
pub fn of_recipe_for_eval(recipe: &Recipe) -> Result<Dataset> {
    open_split(&recipe.data, recipe.model.channels, Split::Evaluate, recipe.text.is_on())
}

/// Opens the set that `config` names to evaluate a model on it that was trained on another: the
/// validation images are those of its validation part or, without one, all of them. There need not be
/// training images.
pub fn open_for_eval(config: &DataConfig, channels: usize) -> Result<Dataset> {
    open_split(config, channels, Split::Evaluate, false)
}

fn open_split(config: &DataConfig, channels: usize, split: Split, captions: bool) -> Result<Dataset> {
    if channels != 1 && channels != 3 {
        return Err(Error::usage(format!(
            "model.channels is {channels}; images are loaded with 1 (grey) or 3 (RGB) channels"
        )));
    }
    if !(0.0..1.0).contains(&config.validation) {
        return Err(Error::usage(format!(
            "data.validation is {}; the share held out for validation must be at least 0 and below 1",
            config.validation
        )));
    }
    let kind = resolve(config)?;
    let path = Path::new(&config.path);
    let dataset = match kind {
        SourceKind::Digits => digits::open(split)?,
        SourceKind::Tar => tar::open(&config.path, split, captions)?,
        SourceKind::Idx => idx::open(path, split)?,
        SourceKind::Cifar => cifar::open(path, split)?,
        SourceKind::Folder | SourceKind::Auto => folder::open(path, split, captions)?,
    };
    if config.cache_mib == 0 || !matches!(kind, SourceKind::Folder | SourceKind::Tar) {
        return Ok(dataset);
    }
    let budget = cache::Budget::new(config.cache_mib.saturating_mul(1 << 20));
    let cached = |source| -> Arc<dyn Source> { Arc::new(cache::Cached::new(source, budget.clone())) };
    let Dataset { classes, train, validation, description } = dataset;
    Ok(Dataset { classes, train: cached(train), validation: cached(validation), description })
}

/// The kind of source that `config` means, `auto` decided.
fn resolve(config: &DataConfig) -> Result<SourceKind> {
    let path = Path::new(&config.path);
    match (config.source, config.path.is_empty()) {
        (SourceKind::Digits | SourceKind::Auto, true) => return Ok(SourceKind::Digits),
        (SourceKind::Digits, false) => {
            return Err(Error::usage(format!(
                "data.source is `digits`, which are built in and take no path; leave data.path empty, or set \
                 data.source to `auto` to read {}",
                config.path
            )));
        }
        (_, true) => {
            return Err(Error::usage(
                "data.path is empty; set it to the folder or file that holds the images",
            ));
        }
        (SourceKind::Tar, false) => return Ok(SourceKind::Tar),
        (SourceKind::Auto, false) if shards::is_tar(&config.path) => return tar_or_folder(path),
        _ => {}
    }
    if !path.exists() {
        return Err(Error::file(path, "there is no such folder; check data.path"));
    }
    if !path.is_dir() {
        return Err(Error::file(path, "this is neither a folder nor a .tar file; point data.path to one"));
    }
    Ok(match config.source {
        SourceKind::Auto if !idx::image_files(path).is_empty() => SourceKind::Idx,
        SourceKind::Auto if cifar::find(path).is_some() => SourceKind::Cifar,
        SourceKind::Auto => SourceKind::Folder,
        chosen => chosen,
    })
}

/// What a path that names tar files means: a folder may hold class folders besides.
fn tar_or_folder(path: &Path) -> Result<SourceKind> {
    if !path.is_dir() || !folder::holds_classes(path) {
        return Ok(SourceKind::Tar);
    }
    if !tar::holds_images(path) {
        return Ok(SourceKind::Folder);
    }
    Err(Error::file(
        path,
        "the folder holds class folders and tar files with images; set data.source to `folder` or `tar`, or \
         move one of them away",
    ))
}

/// `bytes` bytes of a file from `offset`.
fn read_at(path: &Path, offset: u64, bytes: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut data = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
    file.read_exact(&mut data)?;
    Ok(data)
}

fn is_image_name(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| is_image_extension(extension))
}

fn is_image_extension(extension: &str) -> bool {
    ["jpg", "jpeg", "png", "webp"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}
