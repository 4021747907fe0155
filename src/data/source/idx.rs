//! IDX files, the format of MNIST and its family: `train-images-idx3-ubyte(.gz)` with
//! `train-labels-idx1-ubyte(.gz)`, and `t10k-*` or `test-*` for validation.
//!
//! A file is a big-endian magic number (two zero bytes, element type 8 for unsigned bytes, number
//! of dimensions), one 32-bit size a dimension, and the elements in row-major order.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::memory::{self, Row};
use super::split::{self, Class, Part, Sample, Split, Table};
use super::{Dataset, Image};
use crate::error::{Error, Result};

/// The image files in `folder`, sorted.
pub(super) fn image_files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let is_images = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = name.strip_suffix(".gz").unwrap_or(&name);
        name.ends_with("images-idx3-ubyte") || name.ends_with("images.idx3-ubyte")
    };
    let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(is_images).collect();
    files.sort();
    // An unpacked file beside its .gz is the same data.
    files.dedup_by(|later, earlier| {
        later.with_extension("") == *earlier && later.extension().is_some_and(|e| e == "gz")
    });
    files
}

pub(super) fn open(folder: &Path, split: Split) -> Result<Dataset> {
    let files = image_files(folder);
    let (mut samples, mut seen) = (Vec::new(), Vec::new());
    for path in &files {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let part = part_of(&name).ok_or_else(|| {
            Error::file(
                path,
                "the name says neither train, val, test nor t10k; rename the file, as \
                in train-images-idx3-ubyte",
            )
        })?;
        if seen.contains(&part) {
            return Err(Error::file(
                folder,
                format!(
                    "the folder holds several {part:?} files (such as {name}); keep one data set a folder"
                ),
            ));
        }
        seen.push(part);
        samples.extend(read_pair(path, &name, part)?);
    }
    if !seen.contains(&Part::Train) && (seen.is_empty() || matches!(split, Split::Train { .. })) {
        return Err(Error::file(
            folder,
            "there is no train-images-idx3-ubyte or train-images-idx3-ubyte.gz; put the training files there",
        ));
    }
    let names = split::class_names(folder)?;
    Ok(memory::dataset(Table::new(&folder.display().to_string(), samples, names, split)?, "IDX files"))
}

fn part_of(name: &str) -> Option<Part> {
    if name.starts_with("t10k") { Some(Part::Test) } else { Part::of_file(name) }
}

fn read_pair(path: &Path, name: &str, part: Part) -> Result<Vec<Sample<Row>>> {
    let (shape, pixels) = read(path, 3)?;
    let bare = name.strip_suffix(".gz").unwrap_or(name).replace("images", "labels").replace("idx3", "idx1");
    let labels_path = [bare.clone(), format!("{bare}.gz")]
        .into_iter()
        .map(|candidate| path.with_file_name(candidate))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| Error::file(path, format!("the labels {bare} or {bare}.gz are missing beside it")))?;
    let (count, labels) = read(&labels_path, 1)?;
    let [images, height, width] = shape[..] else {
        return Err(Error::file(path, "three dimensions were expected"));
    };
    if count[0] != images {
        return Err(Error::file(
            &labels_path,
            format!(
                "there are {} labels for the {images} images of {}; fetch both again",
                count[0],
                path.display()
            ),
        ));
    }
    if images == 0 || height == 0 || width == 0 {
        return Err(Error::file(
            path,
            format!("{images} images of {height}x{width} pixels hold nothing to learn from"),
        ));
    }
    let origin: Arc<str> = path.display().to_string().into();
    let rows = pixels.chunks_exact(height * width).zip(labels).enumerate();
    Ok(rows
        .map(|(row, (pixels, label))| Sample {
            class: Class::Number(usize::from(label)),
            part: Some(part),
            place: Row {
                image: Image { height, width, channels: 1, pixels: pixels.to_vec() },
                origin: origin.clone(),
                row,
                caption: None,
            },
        })
        .collect())
}

/// The sizes and the elements of a file of unsigned bytes with `rank` dimensions.
fn read(path: &Path, rank: usize) -> Result<(Vec<usize>, Vec<u8>)> {
    let mut bytes =
        fs::read(path).map_err(|e| Error::file(path, format!("the file cannot be read ({e})")))?;
    if bytes.starts_with(&[0x1F, 0x8B]) {
        let mut plain = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut plain).map_err(|e| {
            Error::file(path, format!("the gzip data is cut or damaged ({e}); fetch the file again"))
        })?;
        bytes = plain;
    }
    let word =
        |at: usize| bytes.get(4 * at..4 * at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    let expected = 0x0800 + rank as u32;
    match word(0) {
        Some(magic) if magic == expected => {}
        Some(magic) => {
            return Err(Error::file(
                path,
                format!(
                    "the magic number is 0x{magic:08x} and 0x{expected:08x} was expected; this is \
                     another kind of file"
                ),
            ));
        }
        None => return Err(Error::file(path, "the file is shorter than an IDX header; fetch it again")),
    }
    let shape: Option<Vec<usize>> = (1..=rank).map(|at| word(at).map(|n| n as usize)).collect();
    let shape =
        shape.ok_or_else(|| Error::file(path, "the file is shorter than an IDX header; fetch it again"))?;
    let data = bytes.split_off(4 + 4 * rank);
    let wanted = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    if wanted != Some(data.len()) {
        return Err(Error::file(
            path,
            format!(
                "the header announces {shape:?} bytes and {} follow; the file was cut, fetch it again",
                data.len()
            ),
        ));
    }
    Ok((shape, data))
}
