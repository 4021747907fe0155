//! Tensors that are shared out to several safetensors files.
//!
//! An index `last.safetensors.index.json` stands beside the files that it names, as in other libraries:
//!
//! ```json
//! {"set": "last.120",
//!  "metadata": {"recipe": "…"},
//!  "weight_map": {"blocks.0.attn.qkv.weight": {"shape": [576, 192], "slices": [
//!    {"file": "last.120-00001-of-00002.safetensors", "split": "rows:3", "part": [0, 2], "range": [0, 55296]},
//!    {"file": "last.120-00002-of-00002.safetensors", "split": "rows:3", "part": [1, 2], "range": [0, 55296]}]}}}
//! ```
//!
//! A slice is elements `range` of part `part[0]` of the `part[1]` equal ones into which `split` cuts the tensor: its
//! rows, of each of so many segments (`rows:3`: queries, keys and values), its `columns`, or not at all (`whole`).
//! Its file has it under the name of the tensor. The slices of a tensor hold each of its elements once.
//!
//! An index of other libraries names one file for each tensor, which has all of it:
//!
//! ```json
//! {"metadata": {"total_size": 1}, "weight_map": {"pooler.weight": "model-00001-of-00002.safetensors"}}
//! ```
//!
//! The files of a set name it in their metadata, and no two saves that stand beside each other have one name: the
//! index, which is renamed into its place last, makes the set whole, and files of another save are found out.

mod set;
mod tensors;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use set::TensorSet;
pub use tensors::Tensors;

use crate::autograd::{Shard, Split};
use crate::files::write_atomic;
use crate::{Error, Result};

/// Metadata of a file: the set that it is of.
pub const SET: &str = "set";
const INDEX: &str = ".index.json";
const FILE: &str = ".safetensors";

/// Where the index of the set stands that is used like the file `path`.
pub fn index_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(INDEX);
    name.into()
}

/// Name of file `number` of `count`, from 0.
pub fn file_name(set: &str, number: usize, count: usize) -> String {
    format!("{set}-{:05}-of-{count:05}{FILE}", number + 1)
}

/// What an index says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// Name of the set.
    pub set: String,
    /// Free strings that travel with the tensors.
    pub metadata: BTreeMap<String, String>,
    /// The tensors.
    pub weight_map: BTreeMap<String, Sliced>,
}

/// A tensor of a set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sliced {
    /// Shape of all of it.
    pub shape: Vec<usize>,
    /// Where its elements are.
    pub slices: Vec<StoredSlice>,
}

/// Elements of a tensor in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredSlice {
    /// Name of the file.
    pub file: String,
    /// How the tensor is cut into parts.
    #[serde(with = "words")]
    pub split: Split,
    /// Which part, and of how many.
    pub part: [usize; 2],
    /// Elements of the part.
    pub range: [usize; 2],
}

impl StoredSlice {
    /// Where the elements lie in a whole tensor of `shape`; none where there are none such.
    fn runs(&self, shape: &[usize]) -> Option<Vec<Range<usize>>> {
        let ([rank, size], [start, end]) = (self.part, self.range);
        let len = self.split.part_len(shape, size)?;
        let fits = rank < size && start <= end && end <= len;
        fits.then(|| self.split.runs_of(shape, Shard { rank, size }, start..end))
    }
}

/// Splits in words.
mod words {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::autograd::Split;

    pub(super) fn serialize<S: Serializer>(split: &Split, to: S) -> Result<S::Ok, S::Error> {
        match split {
            Split::Whole | Split::Summed => to.serialize_str("whole"),
            Split::Rows(segments) => to.collect_str(&format_args!("rows:{segments}")),
            Split::Grouped(group) => to.collect_str(&format_args!("grouped:{group}")),
            Split::Columns => to.serialize_str("columns"),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Split, D::Error> {
        let text = String::deserialize(from)?;
        let (kind, number) = text.split_once(':').unwrap_or((&text, ""));
        match (text.as_str(), kind, number.parse()) {
            ("whole", ..) => Ok(Split::Whole),
            ("columns", ..) => Ok(Split::Columns),
            (_, "rows", Ok(segments)) => Ok(Split::Rows(segments)),
            (_, "grouped", Ok(group)) => Ok(Split::Grouped(group)),
            _ => Err(D::Error::custom(format_args!(
                "a tensor cannot be split by {text:?}, expected \"whole\", \"columns\", \"rows:N\" or \"grouped:N\""
            ))),
        }
    }
}

/// What other libraries write: the file that has a tensor.
#[derive(Deserialize)]
struct Named {
    weight_map: BTreeMap<String, String>,
}

impl Named {
    /// The same in our form, but for the shapes, which the files alone tell.
    fn without_shapes(self) -> Index {
        let whole = |file| StoredSlice { file, split: Split::Whole, part: [0, 1], range: [0, 0] };
        let sliced = |file| Sliced { shape: Vec::new(), slices: vec![whole(file)] };
        let weight_map = self.weight_map.into_iter().map(|(name, file)| (name, sliced(file))).collect();
        Index { weight_map, ..Index::default() }
    }
}

impl Index {
    /// Reads `path`. Where it is of another library, shapes and ranges stay empty.
    ///
    /// # Errors
    /// [`Error::Usage`] naming it and what is wrong.
    pub fn load(path: &Path) -> Result<Self> {
        Self::read(path).map(|(index, _)| index)
    }

    /// Reads `path`; and whether it tells shapes.
    fn read(path: &Path) -> Result<(Self, bool)> {
        let bytes = fs::read(path).map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => Error::file(path, "there is no such file"),
            _ => Error::file(path, format_args!("cannot be read: {cause}")),
        })?;
        match (serde_json::from_slice(&bytes), serde_json::from_slice::<Named>(&bytes)) {
            (Ok(index), _) => Ok((index, true)),
            (_, Ok(named)) => Ok((named.without_shapes(), false)),
            (Err(cause), _) => Err(Error::file(
                path,
                format_args!("is not a readable index of a sharded checkpoint ({cause})"),
            )),
        }
    }

    /// Writes `path`, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Failure`] if it cannot be written; an existing one is then unchanged.
    pub fn save_atomic(&self, path: &Path) -> Result<()> {
        write_atomic(path, |out| Ok(serde_json::to_writer(out, self)?))
    }

    /// Names of the files.
    pub fn files(&self) -> BTreeSet<&str> {
        self.weight_map.values().flat_map(|tensor| &tensor.slices).map(|slice| slice.file.as_str()).collect()
    }
}

/// Deletes what no index of `folder` names: files of sets that were replaced, or never became whole. Nothing where
/// an index cannot be read. Only for a folder in which nobody else writes.
///
/// # Errors
/// [`Error::Failure`] if the folder cannot be listed or a file cannot be deleted.
pub fn remove_strays(folder: &Path) -> Result<()> {
    let fail = |cause: io::Error| Error::io(folder, cause);
    let entries = fs::read_dir(folder).map_err(fail)?.collect::<io::Result<Vec<_>>>().map_err(fail)?;
    let names: Vec<String> =
        entries.iter().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let mut named = BTreeSet::new();
    for name in names.iter().filter(|name| name.ends_with(INDEX)) {
        let Ok(index) = Index::load(&folder.join(name)) else { return Ok(()) };
        named.extend(index.files().into_iter().map(str::to_owned));
    }
    let mut stray = names.iter().filter(|name| is_of_set(name) && !named.contains(*name));
    stray.try_for_each(|name| fs::remove_file(folder.join(name)).map_err(fail))
}

/// Whether a file could be one of [`file_name`]s of a run: `last.120-00001-of-00002.safetensors`.
fn is_of_set(name: &str) -> bool {
    let digits = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let parts = || {
        let (rest, count) = name.strip_suffix(FILE)?.rsplit_once("-of-")?;
        let (set, number) = rest.rsplit_once('-')?;
        let (_, step) = set.split_once('.')?;
        Some(
            digits(count) && digits(number) && step.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'),
        )
    };
    parts().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files() {
        for set in ["last.120", "best.7", "step-40.40", "last.120.2"] {
            assert!(is_of_set(&file_name(set, 0, 2)), "{set}");
        }
        let others = [
            "last.safetensors",
            "step-40.safetensors",
            "model-00001-of-00002.safetensors",
            "a.b-00001-of-00002",
        ];
        assert!(!others.into_iter().any(is_of_set));
        assert_eq!(file_name("last.120", 0, 8), "last.120-00001-of-00008.safetensors");
    }

    #[test]
    fn splits_in_words() {
        for split in [Split::Whole, Split::Rows(3), Split::Grouped(4), Split::Columns] {
            let slice = StoredSlice { file: "a".into(), split, part: [1, 2], range: [3, 4] };
            let text = serde_json::to_string(&slice).unwrap();
            assert_eq!(serde_json::from_str::<StoredSlice>(&text).unwrap(), slice, "{text}");
        }
        assert!(serde_json::from_str::<Index>(r#"{"set": "", "metadata": {}, "weight_map": 3}"#).is_err());
    }
}
