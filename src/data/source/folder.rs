//! Class folders: `root/train/<class>/*` with `root/val|validation|test/<class>/*`, or
//! `root/<class>/*` with an automatic split. Images with texts need no class folders.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::Dataset;
use super::files::Files;
use super::split::{self, Class, Part, Sample, Split, Table};
use crate::error::{Error, Result};

pub(super) fn open(root: &Path, split: Split, captions: bool) -> Result<Dataset> {
    let listing = list(root)?;
    let part_of = |folder: &PathBuf| -> Option<(Part, Listing)> {
        let part = Part::of_folder(&file_name(folder))?;
        let inner = list(folder).ok()?;
        let of_classes = inner.images.is_empty() && !inner.folders.is_empty();
        (of_classes || (captions && !inner.images.is_empty())).then_some((part, inner))
    };
    let parts: Vec<(&PathBuf, Option<(Part, Listing)>)> =
        listing.folders.iter().map(|folder| (folder, part_of(folder))).collect();
    let is_train = |part: &(Part, Listing)| part.0 == Part::Train && part.1.images.is_empty();
    let divided = parts.iter().any(|(_, part)| part.as_ref().is_some_and(is_train))
        || split::are_parts(parts.iter().map(|(_, part)| part.as_ref().map(|part| part.0)));
    let mut classes: Vec<(Option<Part>, PathBuf)> = Vec::new();
    let mut ignored = Vec::new();
    // Images of no class.
    let mut loose: Vec<(Option<Part>, PathBuf)> = Vec::new();
    for (folder, part) in parts {
        match part {
            Some((part, inner)) if divided => {
                classes.extend(inner.folders.into_iter().map(|class| (Some(part), class)));
                loose.extend(inner.images.into_iter().map(|image| (Some(part), image)));
            }
            _ if divided => ignored.push(file_name(folder)),
            _ => classes.push((None, folder.clone())),
        }
    }
    if captions && classes.is_empty() && loose.is_empty() {
        loose.extend(listing.images.iter().map(|image| (None, image.clone())));
    }
    let what = if classes.is_empty() { "images with texts" } else { "class folders" };
    let layout = "expected one folder a class, such as `<folder>/cat/1.jpg` or `<folder>/train/cat/1.jpg`";
    if classes.is_empty() && loose.is_empty() {
        return Err(Error::file(
            root,
            if !listing.images.is_empty() {
                format!("the folder holds images but no class folder; {layout}")
            } else if listing.files == 0 {
                format!("the folder is empty; {layout}")
            } else {
                format!("the folder holds neither images nor class folders; {layout}")
            },
        ));
    }
    let samples = classes
        .into_par_iter()
        .map(|(part, folder)| class_samples(part, &folder, root))
        .collect::<Result<Vec<_>>>()?;
    let class = Class::Name(super::CAPTIONED.into());
    let loose = loose.into_iter().map(|(part, place)| Sample { class: class.clone(), part, place });
    let samples = samples.into_iter().flatten().chain(loose).collect();
    let table = Table::new(&root.display().to_string(), samples, None, split)?;
    let mut description = format!("{what}, {}", table.description);
    if !ignored.is_empty() {
        description += &format!("; not read: {}", ignored.join(", "));
    }
    Ok(Dataset {
        classes: table.classes,
        description,
        train: Arc::new(Files::labelled(table.train)),
        validation: Arc::new(Files::labelled(table.validation)),
    })
}

/// Whether a folder below `root` holds images the way class folders do.
pub(super) fn holds_classes(root: &Path) -> bool {
    let inner = |folder: &Path| list(folder).map(|listing| listing.folders).unwrap_or_default();
    let holds_images = |folder: &PathBuf| list(folder).is_ok_and(|listing| !listing.images.is_empty());
    let is_part = |folder: &Path| Part::of_folder(&file_name(folder)).is_some();
    inner(root)
        .iter()
        .any(|folder| holds_images(folder) || (is_part(folder) && inner(folder).iter().any(holds_images)))
}

fn class_samples(part: Option<Part>, folder: &Path, root: &Path) -> Result<Vec<Sample<PathBuf>>> {
    let mut images = Vec::new();
    walk(folder, &mut vec![canonical(root)?], &mut images)?;
    if images.is_empty() {
        return Err(Error::file(
            folder,
            "the class folder holds no JPEG, PNG or WebP image; add images or remove the folder",
        ));
    }
    let class = Class::Name(file_name(folder));
    Ok(images.into_iter().map(|place| Sample { class: class.clone(), part, place }).collect())
}

/// Collects the images of a folder and of those in it; `above` holds the folders on the way to it,
/// links resolved.
fn walk(folder: &Path, above: &mut Vec<PathBuf>, images: &mut Vec<PathBuf>) -> Result<()> {
    let place = canonical(folder)?;
    if above.contains(&place) {
        return Err(Error::file(
            folder,
            format!("the link leads back to {}, which it lies in; remove the link", place.display()),
        ));
    }
    let mut listing = list(folder)?;
    images.append(&mut listing.images);
    above.push(place);
    for inner in &listing.folders {
        walk(inner, above, images)?;
    }
    above.pop();
    Ok(())
}

fn canonical(folder: &Path) -> Result<PathBuf> {
    fs::canonicalize(folder).map_err(|e| Error::file(folder, format!("the folder cannot be read ({e})")))
}

/// What a folder holds, hidden entries aside, sorted by name.
struct Listing {
    folders: Vec<PathBuf>,
    images: Vec<PathBuf>,
    /// Number of files of any kind.
    files: usize,
}

fn list(folder: &Path) -> Result<Listing> {
    let failed = |e: std::io::Error| Error::file(folder, format!("the folder cannot be read ({e})"));
    let mut listing = Listing { folders: Vec::new(), images: Vec::new(), files: 0 };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if file_name(&path).starts_with('.') {
            continue;
        }
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() || (kind.is_symlink() && path.is_dir()) {
            listing.folders.push(path);
        } else if kind.is_file() || (kind.is_symlink() && fs::metadata(&path).map_or(true, |m| m.is_file())) {
            // A broken link stays, to be reported as unreadable; pipes and devices would block.
            listing.files += 1;
            if super::is_image_name(&file_name(&path)) {
                listing.images.push(path);
            }
        }
    }
    listing.folders.sort();
    listing.images.sort();
    Ok(listing)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
