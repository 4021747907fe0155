//! Tar shards: random access over an index that is built once when the set is opened.
//!
//! Two conventions are read. WebDataset: the members `a/0001.jpg` and `a/0001.cls` (integer),
//! `a/0001.txt` (class name) or `a/0001.json` (`label`, `class` or `cls`) make one sample, the key
//! being the path up to the first dot of its base name. Class folders: `train/<class>/1.jpg`, as
//! `tar` makes them from a folder. A set is in the first convention if any image has a label
//! member, and then every image must have one.
//!
//! Where images are learned from texts, `a/0001.txt` is the text of `a/0001.jpg` and no label; other
//! images of the key, `a/0001.seg.png`, are no samples.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::members::{self, Member};
use super::shards::{self, Shard};
use super::split::{self, Class, Part, Sample, Split, Table};
use super::{Dataset, Image, Source, decode};
use crate::error::{Error, Result};

/// Where an image lies.
struct Place {
    shard: u32,
    offset: u64,
    length: u64,
    member: Box<str>,
    /// Where its text lies, and how long it is.
    caption: Option<(u64, u64)>,
}

/// Reading opens the shard each time: as dear as opening a loose image file and small beside
/// decoding, while holding thousands of shards open would run into the limit on open files.
struct Members {
    shards: Arc<Vec<PathBuf>>,
    samples: Vec<(Place, usize)>,
}

impl Members {
    fn read(&self, index: usize, bytes: u64) -> Result<Vec<u8>> {
        self.read_part(index, "image", (self.samples[index].0.offset, bytes))
    }

    fn read_part(&self, index: usize, what: &str, (offset, bytes): (u64, u64)) -> Result<Vec<u8>> {
        super::read_at(&self.shards[self.samples[index].0.shard as usize], offset, bytes)
            .map_err(|e| Error::usage(format!("{}: the {what} cannot be read ({e})", self.name(index))))
    }
}

impl Source for Members {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn name(&self, index: usize) -> String {
        let place = &self.samples[index].0;
        format!("{} member {}", self.shards[place.shard as usize].display(), place.member)
    }

    fn label(&self, index: usize) -> usize {
        self.samples[index].1
    }

    fn size(&self, index: usize) -> Result<(usize, usize)> {
        let length = self.samples[index].0.length;
        decode::size_by(&self.name(index), length, |bytes| self.read(index, bytes))
    }

    fn load(&self, index: usize, channels: usize) -> Result<Image> {
        let bytes = self.read(index, self.samples[index].0.length)?;
        decode::decode(&bytes, &self.name(index), channels)
    }

    fn caption(&self, index: usize) -> Result<String> {
        let name = self.name(index);
        let caption = self.samples[index].0.caption.ok_or_else(|| {
            Error::usage(format!("{name}: there is no text; add a .txt member of the same key"))
        })?;
        super::caption_of(&name, self.read_part(index, "text", caption)?)
    }
}

/// With `captions`, `.txt` members are texts and not classes.
pub(super) fn open(path: &str, split: Split, captions: bool) -> Result<Dataset> {
    let shards = shards::find(path)?;
    let index = |shard: &Shard| members::index(&shard.path, captions);
    let indexes: Vec<Vec<Member>> = shards.par_iter().map(index).collect::<Result<_>>()?;
    let origin = if shards.len() == 1 { shards[0].path.display().to_string() } else { path.to_string() };
    let labelled = indexes.par_iter().map(|members| labels(members, captions)).collect::<Vec<_>>();
    let web = indexes.iter().zip(&labelled).any(|(members, labels)| {
        members.iter().any(|m| m.is_image && m.extension_is_whole && labels.contains_key(m.key()))
    });
    let texts: Vec<Texts> = match captions {
        true => indexes.par_iter().map(|members| texts(members)).collect(),
        false => Vec::new(),
    };
    let mut samples = Vec::new();
    if web {
        for (number, (shard, labels)) in shards.iter().zip(labelled).enumerate() {
            samples.extend(web_samples(number, shard, &indexes[number], labels, captions)?);
        }
    } else {
        let images: Vec<Vec<&Member>> = match captions {
            true => captioned(&shards, &indexes, &texts)?,
            false => indexes.iter().map(|members| members.iter().filter(|m| m.is_image).collect()).collect(),
        };
        let folders = Folders::of(images.iter().flatten().copied(), captions);
        for (number, (shard, images)) in shards.iter().zip(&images).enumerate() {
            samples.extend(folder_samples(number, shard, images, &folders)?);
        }
    }
    if captions {
        for Sample { place, .. } in &mut samples {
            place.caption = texts[place.shard as usize].get(members::stem(&place.member)).copied();
        }
    }
    if samples.is_empty() {
        return Err(Error::usage(format!("{origin}: the tar file holds no JPEG, PNG or WebP image")));
    }
    require_parts(&shards, &samples)?;
    let names = if web { class_names(path, &shards)? } else { None };
    let table = Table::new(&origin, samples, names, split)?;
    let paths = Arc::new(shards.into_iter().map(|shard| shard.path).collect::<Vec<_>>());
    let source = |samples| -> Arc<dyn Source> { Arc::new(Members { shards: paths.clone(), samples }) };
    let description = format!(
        "{} tar {}, {}",
        paths.len(),
        if paths.len() == 1 { "shard" } else { "shards" },
        table.description
    );
    Ok(Dataset {
        classes: table.classes,
        train: source(table.train),
        validation: source(table.validation),
        description,
    })
}

/// Whether any of the tar files in `folder` holds an image.
pub(super) fn holds_images(folder: &Path) -> bool {
    let shards = shards::find(&folder.display().to_string()).unwrap_or_default();
    let has_image =
        |shard: &Shard| members::index(&shard.path, true).is_ok_and(|m| m.iter().any(|m| m.is_image));
    shards.iter().any(has_image)
}

/// `classes.txt` beside the shards or in the folder that was given.
fn class_names(path: &str, shards: &[Shard]) -> Result<Option<Vec<String>>> {
    let beside = shards[0].path.parent().unwrap_or(Path::new(""));
    match split::class_names(beside)? {
        None if Path::new(path).is_dir() => split::class_names(Path::new(path)),
        found => Ok(found),
    }
}

/// Either every sample belongs to a part or none does: a stray shard must not slip into training.
fn require_parts(shards: &[Shard], samples: &[Sample<Place>]) -> Result<()> {
    let stray = samples.iter().find(|s| s.part.is_none());
    match stray {
        Some(stray) if samples.iter().any(|s| s.part.is_some()) => Err(Error::usage(format!(
            "{}: other shards are named train or val and this one is neither; rename it or move it away",
            shards[stray.place.shard as usize].path.display()
        ))),
        _ => Ok(()),
    }
}

fn place(shard: usize, member: &Member) -> Place {
    Place {
        shard: shard as u32,
        offset: member.offset,
        length: member.length,
        member: member.path.as_str().into(),
        caption: None,
    }
}

type Labels<'a> = HashMap<&'a str, (u8, &'a Member)>;

/// The label member of each key: cls before json before txt, which may be a mere caption.
fn labels(members: &[Member], captions: bool) -> Labels<'_> {
    let mut labels = Labels::new();
    for member in members {
        let Some(text) = &member.text else { continue };
        let rank = match member.extension() {
            "cls" => 0,
            "json" if members::json_class(text).is_some() => 1,
            "txt" if !captions => 2,
            _ => continue,
        };
        let entry = labels.entry(member.key()).or_insert((rank, member));
        if rank < entry.0 {
            *entry = (rank, member);
        }
    }
    labels
}

/// Where each text lies, and how long it is, by its path without `.txt`.
type Texts<'a> = HashMap<&'a str, (u64, u64)>;

fn texts(members: &[Member]) -> Texts<'_> {
    members.iter().filter_map(|m| Some((members::caption_stem(&m.path)?, (m.offset, m.length)))).collect()
}

/// The images of each shard that are samples of their own. Where an image is named as its text is, `0001.jpg` with
/// `0001.txt`, those that have no text and whose name goes on behind the key, `0001.seg.png`, belong to the sample.
fn captioned<'a>(
    shards: &[Shard],
    indexes: &'a [Vec<Member>],
    texts: &[Texts<'_>],
) -> Result<Vec<Vec<&'a Member>>> {
    let paired = indexes.iter().zip(texts).any(|(members, texts)| {
        members.iter().any(|m| m.is_image && m.extension_is_whole && texts.contains_key(m.key()))
    });
    let images = |((shard, members), texts): ((&Shard, &'a Vec<Member>), &Texts<'_>)| {
        let own = |m: &&Member| !paired || m.extension_is_whole || texts.contains_key(members::stem(&m.path));
        let images: Vec<&Member> = members.iter().filter(|m| m.is_image).filter(own).collect();
        let mut seen = HashMap::new();
        for image in &images {
            if let Some(other) = seen.insert(members::stem(&image.path), image) {
                return Err(second_image(shard, image, other));
            }
        }
        Ok(images)
    };
    shards.iter().zip(indexes).zip(texts).map(images).collect()
}

fn second_image(shard: &Shard, member: &Member, other: &Member) -> Error {
    Error::usage(format!(
        "{} member {}: the key has a second image, {}; give every image a key of its own",
        shard.path.display(),
        member.path,
        other.path
    ))
}

fn web_samples(
    number: usize,
    shard: &Shard,
    members: &[Member],
    labels: Labels,
    captions: bool,
) -> Result<Vec<Sample<Place>>> {
    let mut seen: HashMap<&str, &Member> = HashMap::new();
    let mut samples = Vec::new();
    // `0001.mask.png` belongs to the sample 0001 and is not its image.
    for member in members.iter().filter(|m| m.is_image && m.extension_is_whole) {
        if let Some(other) = seen.insert(member.key(), member) {
            return Err(second_image(shard, member, other));
        }
        let (_, label) = labels.get(member.key()).ok_or_else(|| {
            Error::usage(format!(
                "{} member {}: there is no label; add a {} (with `label`) member of the same key",
                shard.path.display(),
                member.path,
                if captions { ".cls or .json" } else { ".cls, .txt or .json" }
            ))
        })?;
        samples.push(Sample {
            class: members::class_of(&shard.path, label)?,
            part: shard.part,
            place: place(number, member),
        });
    }
    Ok(samples)
}

/// What the folders above images say.
struct Folders {
    /// How many all images have in common, each image keeping one for its class.
    prefix: usize,
    /// Whether images need no class.
    captions: bool,
    /// Whether a folder of images without a class folder may be a part.
    parts: bool,
}

impl Folders {
    fn of<'a>(images: impl Iterator<Item = &'a Member> + Clone, captions: bool) -> Self {
        let prefix = common_folders(images.clone());
        let first = |image: &Member| image.folders().get(prefix).and_then(|name| Part::of_folder(name));
        Self { prefix, captions, parts: captions && split::are_parts(images.map(first)) }
    }
}

fn common_folders<'a>(images: impl Iterator<Item = &'a Member>) -> usize {
    let mut common: Option<Vec<&str>> = None;
    let mut depth = usize::MAX;
    for member in images {
        let folders = member.folders();
        depth = depth.min(folders.len());
        let same = match &common {
            None => folders.len(),
            Some(known) => known.iter().zip(&folders).take_while(|(a, b)| a == b).count(),
        };
        common.get_or_insert(folders).truncate(same);
    }
    common.map_or(0, |folders| folders.len().min(depth.saturating_sub(1)))
}

fn folder_samples(
    number: usize,
    shard: &Shard,
    images: &[&Member],
    kept: &Folders,
) -> Result<Vec<Sample<Place>>> {
    let mut samples = Vec::new();
    for &member in images {
        let folders = member.folders();
        let own = &folders[kept.prefix..];
        let may_be_part = own.len() > 1 || kept.parts;
        let part = own.first().filter(|_| may_be_part).and_then(|first| Part::of_folder(first));
        let class = if part.is_some() { own.get(1) } else { own.first() };
        let class = class.copied().or(kept.captions.then_some(super::CAPTIONED));
        let class = class.ok_or_else(|| {
            Error::usage(format!(
                "{} member {}: there is neither a label member (.cls, .txt, .json) nor a class folder",
                shard.path.display(),
                member.path
            ))
        })?;
        samples.push(Sample {
            class: Class::Name(class.to_string()),
            part: part.or(shard.part),
            place: place(number, member),
        });
    }
    Ok(samples)
}
