//! Named `f32` tensors in `.safetensors` files.
//!
//! A file is a `u64` header length, a JSON header (name → dtype, shape, byte range; and
//! `__metadata__`, strings to strings), then the data in little-endian order. Reading goes
//! through one tensor at a time, so that a checkpoint needs no second copy of itself in memory;
//! writing borrows the tensors and always yields the same bytes for the same content.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;

use crate::files::write_atomic;
use crate::{Error, Result};

/// The format's own bound on its header.
const MAX_HEADER: u64 = 100_000_000;

/// A set of named tensors with metadata.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weights {
    /// Shape and row-major values of each tensor.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// Free strings that travel with the tensors.
    pub metadata: BTreeMap<String, String>,
}

impl Weights {
    /// Reads a file. F32, BF16, F16 and F64 tensors become `f32`.
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
        let (metadata, mut reader) = open(path)?;
        let mut tensors = BTreeMap::new();
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            if !wanted(&name) {
                let (start, end) = info.data_offsets;
                reader.seek_relative((end - start) as i64).map_err(|cause| Error::file(path, cause))?;
                continue;
            }
            let values = read_tensor(&mut reader, info)
                .map_err(|cause| Error::file(path, format_args!("tensor {name}: {cause}")))?;
            tensors.insert(name, (info.shape.clone(), values));
        }
        Ok(Self { tensors, metadata: strings(&metadata) })
    }

    /// Reads the metadata of a file and nothing else.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load_metadata(path: &Path) -> Result<BTreeMap<String, String>> {
        open(path).map(|(metadata, _)| strings(&metadata))
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
    pub name: std::borrow::Cow<'a, str>,
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
    write_atomic(path, |out| write_to(out, tensors, metadata))
}

fn write_to(
    out: &mut dyn Write,
    tensors: &[TensorRef],
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
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
    for TensorRef { name, shape, data } in tensors {
        assert_eq!(
            shape.iter().product::<usize>(),
            data.len(),
            "tensor {name}: values do not fill the shape"
        );
        let start = end;
        end += size_of_val(*data);
        let entry = Entry { dtype: "F32", shape, data_offsets: [start, end] };
        header.insert(name.to_string(), serde_json::to_value(entry)?);
    }
    let mut header = serde_json::to_vec(&header)?;
    // Readers that map the file want the data aligned.
    header.resize(header.len().next_multiple_of(8), b' ');

    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for TensorRef { data, .. } in tensors {
        if cfg!(target_endian = "little") {
            out.write_all(bytemuck::cast_slice(data))?;
        } else {
            for value in *data {
                out.write_all(&value.to_le_bytes())?;
            }
        }
    }
    Ok(())
}

/// Reads and checks the header; the reader then stands at the data.
fn open(path: &Path) -> Result<(Metadata, BufReader<File>)> {
    let fail = |cause: io::Error| match cause.kind() {
        io::ErrorKind::NotFound => Error::file(path, "there is no such file"),
        _ => Error::file(path, format_args!("cannot be read: {cause}")),
    };
    let damaged = |what: std::fmt::Arguments| {
        Error::file(path, format_args!("is not a readable safetensors file: {what}"))
    };
    let file = File::open(path).map_err(fail)?;
    let meta = file.metadata().map_err(fail)?;
    if meta.is_dir() {
        return Err(Error::file(path, "is a folder, expected a .safetensors file"));
    }
    let size = meta.len();
    let mut reader = BufReader::with_capacity(1 << 20, file);

    if size < 8 {
        return Err(damaged(format_args!("it holds {size} bytes, fewer than its header takes")));
    }
    let mut length = [0; 8];
    reader.read_exact(&mut length).map_err(fail)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(damaged(format_args!("it does not start with a header of that format")));
    }
    if length > size - 8 {
        return Err(damaged(format_args!("its header of {length} bytes is cut short after {}", size - 8)));
    }
    let mut header = vec![0; length as usize];
    reader.read_exact(&mut header).map_err(fail)?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|cause| damaged(format_args!("its header is damaged ({cause})")))?;
    let expected = 8 + length + metadata.data_len() as u64;
    if size != expected {
        return Err(damaged(format_args!("its header describes {expected} bytes and it holds {size}")));
    }
    Ok((metadata, reader))
}

fn strings(metadata: &Metadata) -> BTreeMap<String, String> {
    metadata.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn read_tensor(reader: &mut impl Read, info: &TensorInfo) -> Result<Vec<f32>, String> {
    let count = info.shape.iter().product();
    let values = match info.dtype {
        Dtype::F32 => elements(reader, count, f32::from_le_bytes),
        Dtype::BF16 => elements(reader, count, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::F16 => elements(reader, count, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::F64 => elements(reader, count, |b| f64::from_le_bytes(b) as f32),
        other => return Err(format!("has type {other}, expected F32, BF16, F16 or F64")),
    };
    values.map_err(|cause| format!("cannot be read: {cause}"))
}

fn elements<const B: usize>(
    reader: &mut impl Read,
    count: usize,
    convert: impl Fn([u8; B]) -> f32,
) -> io::Result<Vec<f32>> {
    let mut values = Vec::with_capacity(count);
    let mut block = vec![0; (count * B).min(B << 16)];
    while values.len() < count {
        let take = (count - values.len()).min(1 << 16) * B;
        reader.read_exact(&mut block[..take])?;
        let (chunks, _) = block[..take].as_chunks::<B>();
        values.extend(chunks.iter().map(|bytes| convert(*bytes)));
    }
    Ok(values)
}
