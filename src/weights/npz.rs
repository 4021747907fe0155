//! NumPy's `.npz` archives: a zip of `.npy` arrays, as big_vision and other JAX programs save their weights.
//!
//! An array is a text header (type, order, shape) and the values. Nothing is allocated for what a header merely says:
//! values are read piece by piece and kept as far as they are there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use flate2::read::DeflateDecoder;
use half::{bf16, f16};
use rawzip::{CompressionMethod, FileReader, RECOMMENDED_BUFFER_SIZE, ZipArchive, ZipArchiveEntryWayfinder};

use crate::{Error, Result};

/// Start of an array.
const MAGIC: &[u8] = b"\x93NUMPY";
/// Longest header of an array that is read: those of plain arrays have some hundred bytes.
const MAX_HEADER: usize = 1 << 16;
/// Most members of an archive.
const MAX_MEMBERS: usize = 1 << 20;
/// Bytes that are read at once.
const WINDOW: usize = 1 << 18;

/// An open archive whose arrays are read when they are asked for.
#[derive(Debug)]
pub struct NpzFile {
    path: PathBuf,
    archive: ZipArchive<FileReader>,
    arrays: BTreeMap<String, Array>,
}

#[derive(Debug)]
struct Array {
    at: ZipArchiveEntryWayfinder,
    deflated: bool,
    header: Header,
}

/// What the header of an array says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    /// NumPy's name of the type: `<f4`.
    kind: String,
    /// Whether the first index runs fastest.
    fortran: bool,
    shape: Vec<usize>,
}

/// Names of the members of a zip file; none where it is not one.
pub(super) fn members(path: &Path) -> Option<Vec<String>> {
    let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
    let archive = ZipArchive::from_file(File::open(path).ok()?, &mut buffer).ok()?;
    let mut entries = archive.entries(&mut buffer);
    let mut names = Vec::new();
    while let Ok(Some(entry)) = entries.next_entry() {
        names.push(String::from_utf8_lossy(entry.file_path().as_ref()).into_owned());
        if names.len() == MAX_MEMBERS {
            break;
        }
    }
    Some(names)
}

impl NpzFile {
    /// Reads the list of arrays and their headers.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the file and what is wrong: absent, no zip file, cut short, a member that is no array.
    pub fn open(path: &Path) -> Result<Self> {
        let damaged = |what: &dyn std::fmt::Display| {
            Error::file(path, format_args!("is not a readable npz file: {what}"))
        };
        let file =
            File::open(path).map_err(|cause| Error::file(path, format_args!("cannot be read: {cause}")))?;
        let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
        let archive = ZipArchive::from_file(file, &mut buffer).map_err(|cause| {
            damaged(&format_args!(
                "its list of members is missing or damaged ({cause}); fetch the file again"
            ))
        })?;
        let mut found = Vec::new();
        let mut entries = archive.entries(&mut buffer);
        while let Some(entry) = entries.next_entry().map_err(|cause| damaged(&cause))? {
            let member = String::from_utf8_lossy(entry.file_path().as_ref()).into_owned();
            let deflated = match entry.compression_method() {
                CompressionMethod::STORE => false,
                CompressionMethod::DEFLATE => true,
                other => {
                    return Err(damaged(&format_args!(
                        "member {member} is packed by {other}, expected none or deflate (numpy.savez, \
                         numpy.savez_compressed)"
                    )));
                }
            };
            if found.len() == MAX_MEMBERS {
                return Err(damaged(&format_args!("it has more than {MAX_MEMBERS} members")));
            }
            found.push((member, deflated, entry.wayfinder()));
        }
        let mut file = Self { path: path.into(), archive, arrays: BTreeMap::new() };
        for (member, deflated, at) in found {
            let Some(name) = member.strip_suffix(".npy") else {
                return Err(damaged(&format_args!("member {member} is no .npy array")));
            };
            let header = file.member(at, deflated, |content| Header::read(content));
            let header = header.map_err(|cause| damaged(&format_args!("member {member}: {cause}")))?;
            if file.arrays.insert(name.to_owned(), Array { at, deflated, header }).is_some() {
                return Err(damaged(&format_args!("it has two members {member}")));
            }
        }
        Ok(file)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The arrays, without `.npy`.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.arrays.keys().map(String::as_str)
    }

    /// Shape of an array that is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.arrays.get(name).map(|array| array.header.shape.as_slice())
    }

    /// Whether an array is of a type that is read.
    ///
    /// # Errors
    /// [`Error::Usage`] naming file and array.
    pub fn check_type(&self, name: &str) -> Result<()> {
        match self.arrays.get(name) {
            Some(array) => array.header.bytes().map(drop).map_err(|cause| self.fault(name, cause)),
            None => Ok(()),
        }
    }

    /// Elements of an array in row-major order, one run after another. All of the array is read.
    ///
    /// # Errors
    /// [`Error::Usage`] naming file and array: it is not there, of another type or size, or damaged.
    pub fn read(&self, name: &str, runs: &[Range<usize>]) -> Result<Vec<f32>> {
        let Some(Array { at, deflated, header }) = self.arrays.get(name) else {
            return Err(self.fault(name, "is missing"));
        };
        let values = self.member(*at, *deflated, |content| {
            let header = Header::read(&mut *content)?;
            header.values(content)
        });
        let values = values.map_err(|cause| self.fault(name, cause))?;
        let values = if header.fortran { row_major(&values, &header.shape) } else { values };
        if let Some(run) = runs.iter().find(|run| run.end > values.len() || run.start > run.end) {
            return Err(
                self.fault(name, format_args!("has {} elements, fewer than {}", values.len(), run.end))
            );
        }
        Ok(match runs {
            [all] if *all == (0..values.len()) => values,
            _ => runs.iter().flat_map(|run| &values[run.clone()]).copied().collect(),
        })
    }

    fn fault(&self, name: &str, what: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format_args!("array {name}: {what}"))
    }

    /// Gives `read` the unpacked content of a member, whose checksum is looked at when all of it has been read.
    fn member<T>(
        &self,
        at: ZipArchiveEntryWayfinder,
        deflated: bool,
        read: impl FnOnce(&mut dyn Read) -> Result<T, String>,
    ) -> Result<T, String> {
        let entry = self.archive.get_entry(at).map_err(|cause| cause.to_string())?;
        if deflated {
            read(&mut entry.verifying_reader(DeflateDecoder::new(entry.reader())))
        } else {
            read(&mut entry.verifying_reader(entry.reader()))
        }
    }
}

impl Header {
    /// Reads the header in front of an array.
    fn read(content: &mut (impl Read + ?Sized)) -> Result<Self, String> {
        let short = |cause: io::Error| format!("its header is cut short or damaged ({cause})");
        let mut start = [0; 8];
        content.read_exact(&mut start).map_err(short)?;
        if &start[..6] != MAGIC {
            return Err("it does not start as a .npy array".into());
        }
        let mut length = [0; 4];
        let bytes = match start[6] {
            1 => 2,
            2 | 3 => 4,
            other => return Err(format!("its format has version {other}, expected 1 to 3")),
        };
        content.read_exact(&mut length[..bytes]).map_err(short)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_HEADER {
            return Err(format!("its header announces {length} bytes, expected at most {MAX_HEADER}"));
        }
        let mut text = vec![0; length];
        content.read_exact(&mut text).map_err(short)?;
        let text = String::from_utf8_lossy(&text);
        Self::parse(&text).ok_or_else(|| {
            let shown: String = text.trim().chars().take(80).collect();
            format!("its header {shown:?} is none of an array of numbers")
        })
    }

    /// `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }`.
    fn parse(text: &str) -> Option<Self> {
        let value = |key: &str| {
            let after = text.split_once(&format!("'{key}'"))?.1;
            Some(after.trim_start().strip_prefix(':')?.trim_start())
        };
        let kind = value("descr")?.strip_prefix('\'')?.split_once('\'')?.0.to_owned();
        let order = value("fortran_order")?;
        let fortran = match (order.starts_with("True"), order.starts_with("False")) {
            (true, _) => true,
            (_, true) => false,
            _ => return None,
        };
        let sizes = value("shape")?.strip_prefix('(')?.split_once(')')?.0;
        let sizes = sizes.split(',').map(str::trim).filter(|size| !size.is_empty());
        let shape: Vec<usize> = sizes.map(|size| size.parse().ok()).collect::<Option<_>>()?;
        // As many elements as can be counted, whatever their size.
        shape.iter().try_fold(8usize, |product, size| product.checked_mul(*size))?;
        Some(Self { kind, fortran, shape })
    }

    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of an element.
    fn bytes(&self) -> Result<usize, String> {
        match self.kind.as_str() {
            "<f4" => Ok(4),
            "<f2" | "|V2" | "<V2" => Ok(2),
            "<f8" => Ok(8),
            other => Err(format!(
                "has type {other:?}, expected little-endian f4, f2, f8 or bfloat16 (V2); save it as float32"
            )),
        }
    }

    /// All elements in the order of the file.
    fn values(&self, content: &mut (impl Read + ?Sized)) -> Result<Vec<f32>, String> {
        match (self.bytes()?, self.kind.as_str()) {
            (8, _) => elements(content, self.len(), |b| f64::from_le_bytes(b) as f32),
            (2, "<f2") => elements(content, self.len(), |b| f16::from_le_bytes(b).to_f32()),
            (2, _) => elements(content, self.len(), |b| bf16::from_le_bytes(b).to_f32()),
            _ => elements(content, self.len(), f32::from_le_bytes),
        }
    }
}

/// `count` elements and then the end.
fn elements<const B: usize>(
    content: &mut (impl Read + ?Sized),
    count: usize,
    convert: impl Fn([u8; B]) -> f32,
) -> Result<Vec<f32>, String> {
    let mut values = Vec::with_capacity(count.min(WINDOW));
    let mut window = vec![0; WINDOW];
    let mut held = 0;
    loop {
        let got = content.read(&mut window[held..]).map_err(|cause| format!("is damaged ({cause})"))?;
        held += got;
        let (whole, rest) = window[..held].as_chunks::<B>();
        if values.len() + whole.len() > count || (got == 0 && values.len() < count) {
            let has = if got == 0 { "fewer" } else { "more" };
            return Err(format!("has {has} values than its shape of {count}; fetch the file again"));
        }
        values.extend(whole.iter().map(|bytes| convert(*bytes)));
        if got == 0 {
            return match rest {
                [] => Ok(values),
                _ => Err(format!("has {} bytes after its {count} values; fetch the file again", rest.len())),
            };
        }
        let start = held - rest.len();
        window.copy_within(start..held, 0);
        held -= start;
    }
}

/// Values in which the first index runs fastest, with the last one fastest.
fn row_major(values: &[f32], shape: &[usize]) -> Vec<f32> {
    let mut strides = Vec::with_capacity(shape.len());
    let mut stride = 1;
    for size in shape {
        strides.push(stride);
        stride *= size;
    }
    let mut index = vec![0; shape.len()];
    let mut at = 0;
    let mut ordered = Vec::with_capacity(values.len());
    for _ in 0..values.len() {
        ordered.push(values[at]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            at -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_numpy() {
        let parsed =
            Header::parse("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }   \n").unwrap();
        assert_eq!(parsed, Header { kind: "<f4".into(), fortran: false, shape: vec![2, 3] });
        assert_eq!(Header::parse("{'descr':'|V2','fortran_order':True,'shape':(7,)}").unwrap().shape, [7]);
        assert_eq!(Header::parse("{'shape': (), 'fortran_order': False, 'descr': '<f8'}").unwrap().len(), 1);
        for bad in [
            "",
            "{'descr': '<f4', 'fortran_order': False}",
            "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}",
            "{'descr': '<f4', 'fortran_order': Maybe, 'shape': (2,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 2)}",
        ] {
            assert_eq!(Header::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn fortran_order_is_turned() {
        // [[1, 2, 3], [4, 5, 6]] column by column.
        assert_eq!(row_major(&[1.0, 4.0, 2.0, 5.0, 3.0, 6.0], &[2, 3]), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(row_major(&[], &[0, 3]), [0.0; 0]);
        assert_eq!(row_major(&[3.0], &[]), [3.0]);
    }
}
