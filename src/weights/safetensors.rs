//! Named `f32` tensors in `.safetensors` files.
//!
//! A file is a `u64` header length, a JSON header (name → dtype, shape, byte range; and
//! `__metadata__`, strings to strings), then the data in little-endian order. Reading takes one tensor at a time, or
//! runs of its elements; writing is a stream of tensors after a header that knows their sizes, and always yields the
//! same bytes for the same content. So neither needs a second copy of a checkpoint in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;

use super::{Tensors, recognise};
use crate::files::AtomicFile;
use crate::{Error, Result};

/// The format's own bound on its header.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes that are read at once where less is asked for.
const WINDOW: usize = 1 << 18;
/// Elements after which a writer waits for the disk, or other ranks would wait for all of a large file at its end and
/// take the first for stalled.
const UNSYNCED: usize = 1 << 30;

/// A set of named tensors with metadata.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weights {
    /// Shape and row-major values of each tensor.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// Free strings that travel with the tensors.
    pub metadata: BTreeMap<String, String>,
}

impl Weights {
    /// Reads a safetensors or npz file, or the set of files that an index names. F32, BF16, F16 and F64 tensors
    /// become `f32`.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the file and what is wrong: absent, a folder, damaged, cut short,
    /// or with a tensor of another type.
    pub fn load(path: &Path) -> Result<Self> {
        Self::load_where(path, |_| true)
    }

    /// Reads the tensors whose names `wanted` accepts, and skips the others.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load_where(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<Self> {
        let file = Tensors::open(path)?;
        let mut tensors = BTreeMap::new();
        for name in file.names().into_iter().filter(|name| wanted(name)) {
            let shape = file.shape(&name).unwrap_or_default().to_vec();
            let values = file.read(&name, std::slice::from_ref(&(0..shape.iter().product())))?;
            tensors.insert(name, (shape, values));
        }
        Ok(Self { tensors, metadata: file.metadata() })
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Failure`] if it cannot be written; an existing file is then unchanged.
    pub fn save_atomic(&self, path: &Path) -> Result<()> {
        let tensors: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, (shape, data))| TensorRef { name: name.as_str().into(), shape, data })
            .collect();
        save_atomic(path, &tensors, &self.metadata)
    }
}

/// A borrowed tensor for [`save_atomic`].
#[derive(Clone, Debug)]
pub struct TensorRef<'a> {
    /// Name in the file.
    pub name: Cow<'a, str>,
    /// Shape; its product is the length of `data`.
    pub shape: &'a [usize],
    /// Row-major values.
    pub data: &'a [f32],
}

/// Writes borrowed tensors, in the given order, whole or not at all.
///
/// # Errors
/// [`Error::Failure`] if the file cannot be written; an existing file is then unchanged.
pub fn save_atomic(path: &Path, tensors: &[TensorRef], metadata: &BTreeMap<String, String>) -> Result<()> {
    let shapes = tensors.iter().map(|tensor| (tensor.name.as_ref(), tensor.shape));
    let mut file = TensorWriter::create(path, shapes, metadata)?;
    tensors.iter().try_for_each(|tensor| file.write(tensor.data))?;
    file.finish()?.commit()
}

/// A file that is written tensor after tensor.
#[derive(Debug)]
pub struct TensorWriter {
    file: AtomicFile,
    /// Elements that are still to come.
    left: usize,
    /// Elements that the disk may not have yet.
    unsynced: usize,
}

impl TensorWriter {
    /// Writes the header of a file of these tensors, names and shapes.
    ///
    /// # Errors
    /// [`Error::Failure`] if the file cannot be written.
    pub fn create<'a>(
        path: &Path,
        tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let fail = |cause: io::Error| Error::io(path, cause);
        let (header, left) = header(tensors, metadata).map_err(|cause| fail(cause.into()))?;
        let mut file = AtomicFile::create(path)?;
        file.write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| file.write_all(&header))
            .map_err(fail)?;
        Ok(Self { file, left, unsynced: 0 })
    }

    /// Appends the values of the next tensor, or of a part of it.
    ///
    /// # Errors
    /// [`Error::Failure`] if they cannot be written, or are more than the header says.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        let Some(left) = self.left.checked_sub(values.len()) else {
            return Err(Error::write(self.file.path(), "there are more values than its header says"));
        };
        self.left = left;
        let written = if cfg!(target_endian = "little") {
            self.file.write_all(bytemuck::cast_slice(values))
        } else {
            values.iter().try_for_each(|value| self.file.write_all(&value.to_le_bytes()))
        };
        written.map_err(|cause| Error::io(self.file.path(), cause))?;
        self.unsynced += values.len();
        if self.unsynced > UNSYNCED {
            self.file.sync()?;
            self.unsynced = 0;
        }
        Ok(())
    }

    /// The whole file, which takes its place once it is committed.
    ///
    /// # Errors
    /// [`Error::Failure`] if values are missing.
    pub fn finish(self) -> Result<AtomicFile> {
        match self.left {
            0 => Ok(self.file),
            left => {
                Err(Error::write(self.file.path(), format_args!("{left} values of its tensors are missing")))
            }
        }
    }
}

/// The JSON header, and the number of elements that follow it.
fn header<'a>(
    tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
    metadata: &BTreeMap<String, String>,
) -> serde_json::Result<(Vec<u8>, usize)> {
    #[derive(Serialize)]
    struct Entry<'a> {
        dtype: &'a str,
        shape: &'a [usize],
        data_offsets: [usize; 2],
    }
    // serde_json's map is sorted, which makes the header the same for the same content.
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::to_value(metadata)?);
    }
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * size_of::<f32>();
        let entry = Entry { dtype: "F32", shape, data_offsets: [start, end] };
        header.insert(name.to_owned(), serde_json::to_value(entry)?);
    }
    let mut header = serde_json::to_vec(&header)?;
    // Readers that map the file want the data aligned.
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok((header, end / size_of::<f32>()))
}

/// An open file whose tensors are read when they are asked for. It stays the same file where another takes its place.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Where the data begins.
    data: u64,
}

impl TensorFile {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the file and what is wrong: absent, a folder, damaged, cut short.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |cause: io::Error| match cause.kind() {
            io::ErrorKind::NotFound => Error::file(path, "there is no such file"),
            _ => Error::file(path, format_args!("cannot be read: {cause}")),
        };
        let mut file = File::open(path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        if meta.is_dir() {
            return Err(Error::file(path, "is a folder, expected a .safetensors file"));
        }
        let size = meta.len();
        let mut start = [0; 9];
        file.read_exact(&mut start[..size.min(9) as usize]).map_err(fail)?;
        let [length @ .., first] = start;
        let length = u64::from_le_bytes(length);
        // Starts of other files may read as a length, too; the brace of a header tells them apart.
        let braced = length <= MAX_HEADER && first == b'{';
        let damaged = |what: std::fmt::Arguments| match recognise::other_format(path) {
            Some(told) if !braced => Error::file(path, told),
            _ => Error::file(path, format_args!("is not a readable safetensors file: {what}")),
        };
        if size < 8 {
            return Err(damaged(format_args!("it holds {size} bytes, fewer than its header takes")));
        }
        if length > MAX_HEADER {
            return Err(damaged(format_args!(
                "it does not start with the length of a header, expected at most {MAX_HEADER} bytes; fetch the file \
                 again"
            )));
        }
        file.seek(SeekFrom::Start(8)).map_err(fail)?;
        if length > size - 8 {
            return Err(damaged(format_args!(
                "its header of {length} bytes is cut short after {}; fetch the file again",
                size - 8
            )));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(fail)?;
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|cause| damaged(format_args!("its header is damaged ({cause})")))?;
        let data = header.data_len() as u64;
        if size - 8 - length != data {
            return Err(damaged(format_args!(
                "its header describes {data} bytes of data and it holds {}; fetch the file again",
                size - 8 - length
            )));
        }
        Ok(Self { path: path.into(), file, header, data: 8 + length })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The free strings.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// The tensors in the order of their data.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.header.offset_keys().into_iter()
    }

    /// Shape of a tensor that is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.header.info(name).map(|info| info.shape.as_slice())
    }

    /// Whether a tensor is of a type that is read.
    ///
    /// # Errors
    /// [`Error::Usage`] naming file and tensor.
    pub fn check_type(&self, name: &str) -> Result<()> {
        match self.header.info(name).map(|info| info.dtype) {
            None | Some(Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64) => Ok(()),
            Some(other) => {
                Err(self.fault(name, format_args!("has type {other}, expected F32, BF16, F16 or F64")))
            }
        }
    }

    /// Elements of a tensor, one run after another; runs that rise are read the fastest.
    ///
    /// # Errors
    /// [`Error::Usage`] naming file and tensor: it is not there, of another type or size, or cannot be read.
    pub fn read(&self, name: &str, runs: &[Range<usize>]) -> Result<Vec<f32>> {
        self.check_type(name)?;
        let Some(info) = self.header.info(name) else { return Err(self.fault(name, "is missing")) };
        let count: usize = info.shape.iter().product();
        if let Some(run) = runs.iter().find(|run| run.end > count) {
            return Err(self.fault(name, format_args!("has {count} elements, fewer than {}", run.end)));
        }
        let values = match info.dtype {
            Dtype::BF16 => self.elements(info, runs, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F16 => self.elements(info, runs, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::F64 => self.elements(info, runs, |b| f64::from_le_bytes(b) as f32),
            _ => self.elements(info, runs, f32::from_le_bytes),
        };
        values.map_err(|cause| self.fault(name, format_args!("cannot be read: {cause}")))
    }

    fn fault(&self, name: &str, what: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format_args!("tensor {name}: {what}"))
    }

    /// Reads windows of the file: one read for many small runs that are close, and none larger than a window. Plain
    /// reads and not a mapping, which would end the process where the file shrinks or its disk fails.
    fn elements<const B: usize>(
        &self,
        info: &TensorInfo,
        runs: &[Range<usize>],
        convert: impl Fn([u8; B]) -> f32,
    ) -> io::Result<Vec<f32>> {
        let all = info.data_offsets.1 - info.data_offsets.0;
        let mut values = Vec::with_capacity(runs.iter().map(Range::len).sum());
        let mut window = Vec::new();
        // Bytes of the tensor that are in the window.
        let mut held = 0..0;
        for run in runs {
            let mut at = run.start * B;
            while at < run.end * B {
                if !held.contains(&at) {
                    held = at..all.min(at + WINDOW);
                    window.resize(held.len(), 0);
                    let mut file = &self.file;
                    file.seek(SeekFrom::Start(self.data + (info.data_offsets.0 + at) as u64))?;
                    file.read_exact(&mut window)?;
                }
                let end = held.end.min(run.end * B);
                let (elements, _) = window[at - held.start..end - held.start].as_chunks::<B>();
                values.extend(elements.iter().map(|bytes| convert(*bytes)));
                at = end;
            }
        }
        Ok(values)
    }
}
