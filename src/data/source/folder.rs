//! Class folders: `root/train/<class>/*` with `root/val|validation|test/<class>/*`, or
//! `root/<class>/*` with an automatic split.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::Dataset;
use super::files::Files;
use super::split::{Class, Part, Sample, Split, Table};
use crate::error::{Error, Result};

pub(super) fn open(root: &Path, split: Split) -> Result<Dataset> {
    let listing = list(root)?;
    let parts: Vec<(Part, &PathBuf)> = listing
        .folders
        .iter()
        .filter_map(|folder| Some((Part::of_folder(&file_name(folder))?, folder)))
        .filter(|(_, folder)| {
            list(folder).is_ok_and(|inner| inner.images.is_empty() && !inner.folders.is_empty())
        })
        .collect();
    let divided = parts.iter().any(|(part, _)| *part == Part::Train)
        || (!parts.is_empty() && parts.len() == listing.folders.len());
    let mut classes: Vec<(Option<Part>, PathBuf)> = Vec::new();
    if divided {
        for (part, folder) in parts {
            classes.extend(list(folder)?.folders.into_iter().map(|class| (Some(part), class)));
        }
    } else {
        classes.extend(listing.folders.into_iter().map(|class| (None, class)));
    }
    let layout = "expected one folder a class, such as `<folder>/cat/1.jpg` or `<folder>/train/cat/1.jpg`";
    if classes.is_empty() {
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
        .map(|(part, folder)| class_samples(part, &folder))
        .collect::<Result<Vec<_>>>()?;
    let table =
        Table::new(&root.display().to_string(), samples.into_iter().flatten().collect(), None, split)?;
    Ok(Dataset {
        classes: table.classes,
        train: Arc::new(Files::labelled(table.train)),
        validation: Arc::new(Files::labelled(table.validation)),
    })
}

fn class_samples(part: Option<Part>, folder: &Path) -> Result<Vec<Sample<PathBuf>>> {
    let mut images = Vec::new();
    walk(folder, &mut images)?;
    if images.is_empty() {
        return Err(Error::file(
            folder,
            "the class folder holds no JPEG, PNG or WebP image; add images or remove the folder",
        ));
    }
    let class = Class::Name(file_name(folder));
    Ok(images.into_iter().map(|place| Sample { class: class.clone(), part, place }).collect())
}

fn walk(folder: &Path, images: &mut Vec<PathBuf>) -> Result<()> {
    let mut listing = list(folder)?;
    images.append(&mut listing.images);
    for inner in &listing.folders {
        walk(inner, images)?;
    }
    Ok(())
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
        } else {
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
