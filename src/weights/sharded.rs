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
//! The files of a set name it in their metadata, and no two saves that stand beside each other have one name: the
//! index, which is renamed into its place last, makes the set whole, and files of another save are found out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::safetensors::TensorFile;
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
            Split::Columns => to.serialize_str("columns"),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Split, D::Error> {
        let text = String::deserialize(from)?;
        let segments = text.strip_prefix("rows:").and_then(|segments| segments.parse().ok());
        match (text.as_str(), segments) {
            ("whole", _) => Ok(Split::Whole),
            ("columns", _) => Ok(Split::Columns),
            (_, Some(segments)) => Ok(Split::Rows(segments)),
            _ => Err(D::Error::custom(format_args!(
                "a tensor cannot be split by {text:?}, expected \"whole\", \"columns\" or \"rows:N\""
            ))),
        }
    }
}

impl Index {
    /// Reads `path`.
    ///
    /// # Errors
    /// [`Error::Usage`] naming it and what is wrong.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => Error::file(path, "there is no such file"),
            _ => Error::file(path, format_args!("cannot be read: {cause}")),
        })?;
        serde_json::from_slice(&bytes).map_err(|cause| {
            Error::file(path, format_args!("is not a readable index of a sharded checkpoint ({cause})"))
        })
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

/// A set of files that are read when their tensors are asked for.
#[derive(Debug)]
pub struct TensorSet {
    path: PathBuf,
    index: Index,
    files: BTreeMap<String, TensorFile>,
}

impl TensorSet {
    /// Opens all files that the index at `path` names, and checks that they hold everything once.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the index or file, and what is wrong: absent, damaged, of another save; elements that
    /// are in no file or in two.
    pub fn open(path: &Path) -> Result<Self> {
        let index = Index::load(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut files = BTreeMap::new();
        for name in index.files() {
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(Error::file(
                    path,
                    format_args!("names {name:?}, which is no name of a file beside it"),
                ));
            }
            let at = folder.join(name);
            if !at.exists() {
                return Err(Error::file(
                    &at,
                    format_args!(
                        "is missing, and {} names it; restore it, or use another checkpoint",
                        path.display()
                    ),
                ));
            }
            let file = TensorFile::open(&at)?;
            let set = file.metadata().remove(SET).unwrap_or_default();
            if set != index.set {
                return Err(Error::file(
                    &at,
                    format_args!(
                        "is of another save ({set:?}) than {} ({:?}); restore it, or use another checkpoint",
                        path.display(),
                        index.set
                    ),
                ));
            }
            files.insert(name.to_owned(), file);
        }
        let set = Self { path: path.into(), index, files };
        set.index.weight_map.iter().try_for_each(|(name, tensor)| set.check(name, tensor))?;
        Ok(set)
    }

    /// Checks that the slices of a tensor are where the index says, and hold every element once.
    fn check(&self, name: &str, tensor: &Sliced) -> Result<()> {
        let mut runs: Vec<(Range<usize>, &str)> = Vec::new();
        for slice in &tensor.slices {
            let Some(own) = slice.runs(&tensor.shape) else {
                return Err(Error::file(
                    &self.path,
                    format_args!("says that {} has a slice of {name} that its shape has not", slice.file),
                ));
            };
            let file = &self.files[&slice.file];
            let len = slice.range[1] - slice.range[0];
            match file.shape(name).map(|shape| shape.iter().product::<usize>()) {
                Some(found) if found == len => file.check_type(name)?,
                found => {
                    let found = found.map_or("no".into(), |found| found.to_string());
                    return Err(Error::file(
                        file.path(),
                        format_args!(
                            "holds {found} elements of {name}, and {} says {len}",
                            self.path.display()
                        ),
                    ));
                }
            }
            runs.extend(own.into_iter().map(|run| (run, slice.file.as_str())));
        }
        runs.sort_by_key(|(run, _)| run.start);
        let (mut at, mut before) = (0, "");
        let count = tensor.shape.iter().product();
        for (run, file) in runs.into_iter().chain([(count..count, "")]) {
            if run.start > at {
                let (from, to) = (at, run.start);
                return Err(Error::file(
                    &self.path,
                    format_args!("is incomplete: none of its files has elements {from} to {to} of {name}"),
                ));
            }
            if run.start < at {
                let twice = match before == file {
                    true => format!("twice in {file}"),
                    false => format!("in {before} and in {file}"),
                };
                return Err(Error::file(
                    &self.path,
                    format_args!("is damaged: element {} of {name} is {twice}", run.start),
                ));
            }
            (at, before) = (run.end, file);
        }
        Ok(())
    }

    fn read(&self, name: &str, runs: &[Range<usize>]) -> Result<Vec<f32>> {
        let Some(tensor) = self.index.weight_map.get(name) else {
            return Err(Error::file(&self.path, format_args!("tensor {name}: is missing")));
        };
        let mut values = vec![0.0; runs.iter().map(Range::len).sum()];
        for slice in &tensor.slices {
            let own = slice.runs(&tensor.shape).unwrap_or_default();
            let (stored, wanted) = common(&own, runs);
            if stored.is_empty() {
                continue;
            }
            let found = self.files[&slice.file].read(name, &stored)?;
            let mut rest = &found[..];
            for range in wanted {
                let (head, tail) = rest.split_at(range.len());
                values[range].copy_from_slice(head);
                rest = tail;
            }
        }
        Ok(values)
    }
}

/// What two rising lists of runs have in common, as ranges of the elements of the first and of the second.
fn common(a: &[Range<usize>], b: &[Range<usize>]) -> (Vec<Range<usize>>, Vec<Range<usize>>) {
    let (mut in_a, mut in_b) = (Vec::new(), Vec::new());
    let (mut i, mut j, mut before_a, mut before_b) = (0, 0, 0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let (first, last) = (x.start.max(y.start), x.end.min(y.end));
        if first < last {
            in_a.push(before_a + first - x.start..before_a + last - x.start);
            in_b.push(before_b + first - y.start..before_b + last - y.start);
        }
        if x.end <= y.end {
            before_a += x.len();
            i += 1;
        } else {
            before_b += y.len();
            j += 1;
        }
    }
    (in_a, in_b)
}

/// Named tensors in one file, or in the files of a set.
#[derive(Debug)]
pub enum Tensors {
    /// One file.
    File(TensorFile),
    /// A set.
    Set(TensorSet),
}

impl Tensors {
    /// Opens a file, an index, or the set whose index stands where there is no file `path`.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the file and what is wrong.
    pub fn open(path: &Path) -> Result<Self> {
        match index_at(path) {
            Some(index) => TensorSet::open(&index).map(Self::Set),
            None => TensorFile::open(path).map(Self::File),
        }
    }

    /// Reads the metadata and nothing else.
    ///
    /// # Errors
    /// As for [`open`](Self::open); other files of a set are not looked at.
    pub fn load_metadata(path: &Path) -> Result<BTreeMap<String, String>> {
        match index_at(path) {
            Some(index) => Index::load(&index).map(|index| index.metadata),
            None => TensorFile::open(path).map(|file| file.metadata()),
        }
    }

    /// Whether there is a file or a set at `path`.
    pub fn exist(path: &Path) -> bool {
        path.is_file() || index_at(path).is_some()
    }

    /// The file or the index.
    pub fn path(&self) -> &Path {
        match self {
            Self::File(file) => file.path(),
            Self::Set(set) => &set.path,
        }
    }

    /// The free strings.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            Self::File(file) => file.metadata(),
            Self::Set(set) => set.index.metadata.clone(),
        }
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        match self {
            Self::File(file) => file.names().collect(),
            Self::Set(set) => set.index.weight_map.keys().cloned().collect(),
        }
    }

    /// Shape of a tensor that is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        match self {
            Self::File(file) => file.shape(name),
            Self::Set(set) => set.index.weight_map.get(name).map(|tensor| tensor.shape.as_slice()),
        }
    }

    /// Whether a tensor is of a type that is read.
    ///
    /// # Errors
    /// [`Error::Usage`] naming file and tensor.
    pub fn check_type(&self, name: &str) -> Result<()> {
        match self {
            Self::File(file) => file.check_type(name),
            // Looked at when it was opened.
            Self::Set(_) => Ok(()),
        }
    }

    /// Elements of a tensor, one run after another, in rising order.
    ///
    /// # Errors
    /// [`Error::Usage`] naming file and tensor: it is not there, of another type or size, or cannot be read.
    pub fn read(&self, name: &str, runs: &[Range<usize>]) -> Result<Vec<f32>> {
        match self {
            Self::File(file) => file.read(name, runs),
            Self::Set(set) => set.read(name, runs),
        }
    }
}

/// The index that `path` stands for.
fn index_at(path: &Path) -> Option<PathBuf> {
    if path.as_os_str().to_string_lossy().ends_with(INDEX) {
        return Some(path.into());
    }
    let index = index_of(path);
    (!path.exists() && index.is_file()).then_some(index)
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
    fn runs_in_common() {
        let (a, b) = ([2..5, 8..12, 20..30], [0..3, 4..9, 11..25]);
        let (in_a, in_b) = common(&a, &b);
        assert_eq!(in_a, [0..1, 2..3, 3..4, 6..7, 7..12]);
        assert_eq!(in_b, [2..3, 3..4, 7..8, 8..9, 17..22]);
        let elements = |runs: &[Range<usize>], ranges: Vec<Range<usize>>| -> Vec<usize> {
            let all: Vec<usize> = runs.iter().cloned().flatten().collect();
            ranges.into_iter().flat_map(|range| all[range].to_vec()).collect()
        };
        assert_eq!(elements(&a, in_a), elements(&b, in_b));
        assert_eq!(common(&a, &[]), (vec![], vec![]));
    }

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
        for split in [Split::Whole, Split::Rows(3), Split::Columns] {
            let slice = StoredSlice { file: "a".into(), split, part: [1, 2], range: [3, 4] };
            let text = serde_json::to_string(&slice).unwrap();
            assert_eq!(serde_json::from_str::<StoredSlice>(&text).unwrap(), slice, "{text}");
        }
        assert!(serde_json::from_str::<Index>(r#"{"set": "", "metadata": {}, "weight_map": 3}"#).is_err());
    }
}
