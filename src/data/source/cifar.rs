//! The binary version of CIFAR-10 and CIFAR-100: records of one label byte (CIFAR-100: a coarse
//! and a fine one, of which the fine one counts) and 3072 bytes, three 32x32 planes R, G, B.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::memory::{self, Row};
use super::split::{self, Class, Part, Sample, Split, Table};
use super::{Dataset, Image};
use crate::error::{Error, Result};

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;

struct Layout {
    train: Vec<PathBuf>,
    test: PathBuf,
    names: PathBuf,
    label_bytes: usize,
    classes: usize,
}

/// The folder that holds the files: `folder` itself or the one the official archives unpack to.
pub(super) fn find(folder: &Path) -> Option<PathBuf> {
    [folder.to_path_buf(), folder.join("cifar-10-batches-bin"), folder.join("cifar-100-binary")]
        .into_iter()
        .find(|f| f.join("data_batch_1.bin").is_file() || f.join("train.bin").is_file())
}

pub(super) fn open(folder: &Path, split: Split) -> Result<Dataset> {
    let Some(folder) = find(folder) else {
        return Err(Error::file(
            folder,
            if folder.join("data_batch_1").is_file() || folder.join("train").is_file() {
                "this is the Python version of CIFAR; fetch the binary version (data_batch_1.bin or \
                 train.bin)"
            } else {
                "there is neither data_batch_1.bin (CIFAR-10) nor train.bin (CIFAR-100); fetch the \
                 binary version"
            },
        ));
    };
    let layout = if folder.join("data_batch_1.bin").is_file() {
        Layout {
            train: (1..=5).map(|n| folder.join(format!("data_batch_{n}.bin"))).collect(),
            test: folder.join("test_batch.bin"),
            names: folder.join("batches.meta.txt"),
            label_bytes: 1,
            classes: 10,
        }
    } else {
        Layout {
            train: vec![folder.join("train.bin")],
            test: folder.join("test.bin"),
            names: folder.join("fine_label_names.txt"),
            label_bytes: 2,
            classes: 100,
        }
    };
    let mut samples = Vec::new();
    for path in &layout.train {
        samples.extend(read(path, &layout, Part::Train)?);
    }
    if layout.test.is_file() {
        samples.extend(read(&layout.test, &layout, Part::Test)?);
    }
    let names = split::names_in(&layout.names)?;
    Ok(memory::dataset(Table::new(&folder.display().to_string(), samples, names, split)?, "CIFAR files"))
}

fn read(path: &Path, layout: &Layout, part: Part) -> Result<Vec<Sample<Row>>> {
    let bytes = fs::read(path).map_err(|e| Error::file(path, format!("the file cannot be read ({e})")))?;
    let record = layout.label_bytes + 3 * PLANE;
    if bytes.is_empty() || !bytes.len().is_multiple_of(record) {
        return Err(Error::file(
            path,
            format!(
                "{} bytes are no whole number of {record}-byte records; the file was cut, fetch it again",
                bytes.len()
            ),
        ));
    }
    let origin: Arc<str> = path.display().to_string().into();
    bytes
        .chunks_exact(record)
        .enumerate()
        .map(|(row, record)| {
            let (labels, planes) = record.split_at(layout.label_bytes);
            let label = usize::from(labels[layout.label_bytes - 1]);
            if label >= layout.classes {
                return Err(Error::file(
                    path,
                    format!(
                        "record {row} has label {label} of {} classes; this is no CIFAR file",
                        layout.classes
                    ),
                ));
            }
            let pixels =
                (0..PLANE).flat_map(|i| [planes[i], planes[PLANE + i], planes[2 * PLANE + i]]).collect();
            Ok(Sample {
                class: Class::Number(label),
                part: Some(part),
                place: Row {
                    image: Image { height: SIDE, width: SIDE, channels: 3, pixels },
                    origin: origin.clone(),
                    row,
                    caption: None,
                },
            })
        })
        .collect()
}
