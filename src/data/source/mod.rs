//! Where images come from: one trait, one file per kind of source.

pub mod cache;
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

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::models::recipe::{DataConfig, SourceKind};

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

    /// (height, width) as [`Source::load`] will return it, EXIF orientation applied, read from the
    /// header. An error begins with the sample's name.
    fn size(&self, index: usize) -> Result<(usize, usize)>;

    /// Decodes the sample to `channels` (1 or 3). An error begins with the sample's name.
    fn load(&self, index: usize, channels: usize) -> Result<Image>;
}

/// Training and validation images with the names of their classes.
pub struct Dataset {
    /// Class names; a label is an index into them.
    pub classes: Vec<String>,
    /// Training images.
    pub train: Arc<dyn Source>,
    /// Validation images.
    pub validation: Arc<dyn Source>,
}

impl Dataset {
    /// What a report calls class `label`: its name, or the number where there is no such class.
    pub fn class_name(&self, label: usize) -> String {
        self.classes.get(label).cloned().unwrap_or_else(|| label.to_string())
    }
}

/// FNV-1a over base name and label of every sample in order: the same for a set that moved to
/// another folder, another one where images were added, removed, renamed or changed their class.
pub fn fingerprint(source: &dyn Source) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for index in 0..source.len() {
        let name = source.name(index);
        add(name.rsplit('/').next().unwrap_or_default().as_bytes());
        add(&[0]);
        add(&(source.label(index) as u64).to_le_bytes());
    }
    hash
}

/// Opens the set that `config` names. `channels` (1 or 3) is what images will be loaded with;
/// `seed` decides the automatic train/validation split.
///
/// [`SourceKind::Auto`] looks at `config.path`: the built-in digits where it is empty; tar shards
/// for a `.tar` file, a pattern with braces, or a folder that holds `.tar` files; IDX for a folder
/// with `*-images-idx3-ubyte(.gz)`; CIFAR for one with `data_batch_1.bin` or `train.bin`; else class
/// folders. Images from folders and tar files are kept in memory up to `config.cache_mib`, which
/// training and validation share; the other sources are in memory anyway.
pub fn open(config: &DataConfig, channels: usize, seed: u64) -> Result<Dataset> {
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
    let split = split::Split { share: config.validation, seed };
    let kind = resolve(config)?;
    let path = Path::new(&config.path);
    let dataset = match kind {
        SourceKind::Digits => digits::open(split)?,
        SourceKind::Tar => tar::open(&config.path, split)?,
        SourceKind::Idx => idx::open(path, split)?,
        SourceKind::Cifar => cifar::open(path, split)?,
        SourceKind::Folder | SourceKind::Auto => folder::open(path, split)?,
    };
    if config.cache_mib == 0 || !matches!(kind, SourceKind::Folder | SourceKind::Tar) {
        return Ok(dataset);
    }
    let budget = cache::Budget::new(config.cache_mib.saturating_mul(1 << 20));
    let cached = |source| -> Arc<dyn Source> { Arc::new(cache::Cached::new(source, budget.clone())) };
    Ok(Dataset {
        classes: dataset.classes,
        train: cached(dataset.train),
        validation: cached(dataset.validation),
    })
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
        (SourceKind::Auto, false) if shards::is_tar(&config.path) => return Ok(SourceKind::Tar),
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
