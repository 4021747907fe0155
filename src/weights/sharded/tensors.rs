//! Tensors in whatever form they were saved.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{INDEX, Index, TensorSet, index_of};
use crate::Result;
use crate::weights::npz::NpzFile;
use crate::weights::recognise;
use crate::weights::safetensors::TensorFile;

/// Named tensors in one file, or in the files of a set.
#[derive(Debug)]
pub enum Tensors {
    /// One file.
    File(TensorFile),
    /// An archive of NumPy arrays.
    Npz(NpzFile),
    /// A set.
    Set(TensorSet),
}

impl Tensors {
    /// Opens a safetensors or npz file, told apart by their content, an index, or the set whose index stands where there is no file `path`.
    ///
    /// # Errors
    /// [`Error::Usage`](crate::Error::Usage) naming the file and what is wrong.
    pub fn open(path: &Path) -> Result<Self> {
        match index_at(path) {
            Some(index) => TensorSet::open(&index).map(Self::Set),
            None if recognise::is_npz(path) => NpzFile::open(path).map(Self::Npz),
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
            None if recognise::is_npz(path) => Ok(BTreeMap::new()),
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
            Self::Npz(file) => file.path(),
            Self::Set(set) => &set.path,
        }
    }

    /// The free strings.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            Self::File(file) => file.metadata(),
            Self::Npz(_) => BTreeMap::new(),
            Self::Set(set) => set.index.metadata.clone(),
        }
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        match self {
            Self::File(file) => file.names().collect(),
            Self::Npz(file) => file.names().map(str::to_owned).collect(),
            Self::Set(set) => set.index.weight_map.keys().cloned().collect(),
        }
    }

    /// Shape of a tensor that is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        match self {
            Self::File(file) => file.shape(name),
            Self::Npz(file) => file.shape(name),
            Self::Set(set) => set.index.weight_map.get(name).map(|tensor| tensor.shape.as_slice()),
        }
    }

    /// Whether a tensor is of a type that is read.
    ///
    /// # Errors
    /// [`Error::Usage`](crate::Error::Usage) naming file and tensor.
    pub fn check_type(&self, name: &str) -> Result<()> {
        match self {
            Self::File(file) => file.check_type(name),
            Self::Npz(file) => file.check_type(name),
            Self::Set(set) => set.check_type(name),
        }
    }

    /// Elements of a tensor, one run after another, in rising order.
    ///
    /// # Errors
    /// [`Error::Usage`](crate::Error::Usage) naming file and tensor: it is not there, of another type or size, or cannot be read.
    pub fn read(&self, name: &str, runs: &[Range<usize>]) -> Result<Vec<f32>> {
        match self {
            Self::File(file) => file.read(name, runs),
            Self::Npz(file) => file.read(name, runs),
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
