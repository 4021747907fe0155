//! What a file of weights is, by its content: its name proves nothing.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::npz;

/// Bytes that are looked at.
const START: u64 = 512;
/// Start of a zip file.
const ZIP: &[u8] = b"PK\x03\x04";

/// Whether a file is a zip of NumPy arrays.
pub(super) fn is_npz(path: &Path) -> bool {
    let start = start_of(path);
    start.starts_with(ZIP) && !pickled(path, &start) && first_member(&start).ends_with(".npy")
}

/// For a file that is no safetensors file: what it is, and what to do with it.
pub(super) fn other_format(path: &Path) -> Option<String> {
    let start = start_of(path);
    let text = String::from_utf8_lossy(&start).trim_start().to_lowercase();
    let zip = start.starts_with(ZIP);
    if (zip && pickled(path, &start)) || is_pickle(&start) {
        return Some(pickle(path));
    }
    let told = if zip {
        "is a zip file, but none of NumPy arrays (.npz); unpack it and give the file of weights in it"
    } else if is_onnx(&start) {
        "is an ONNX graph, expected safetensors or npz: export the weights of the network it was made from, or take \
         the graph's initializers as tools/dinov2_onnx.py does"
    } else if start.starts_with(b"\x93NUMPY") {
        "is a single NumPy array (.npy), expected named tensors: save them with numpy.savez or as safetensors"
    } else if start.starts_with(b"\x89HDF\r\n") {
        "is an HDF5 file (Keras), expected safetensors or npz: load it where it was made and save its weights with \
         numpy.savez"
    } else if start.starts_with(b"GGUF") {
        "is a GGUF file, expected safetensors or npz"
    } else if start.starts_with(&[0x1F, 0x8B]) {
        "is gzip data; unpack it first"
    } else if text.starts_with("version https://git-lfs") {
        "is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`"
    } else if text.starts_with("<!doctype") || text.starts_with("<html") {
        "is a web page and not a file of weights; fetch the file itself, not the page that shows it"
    } else {
        return None;
    };
    Some(told.into())
}

fn start_of(path: &Path) -> Vec<u8> {
    let mut start = Vec::new();
    // What cannot be read has no start; whoever opens the file says why.
    let _ = File::open(path).and_then(|file| file.take(START).read_to_end(&mut start));
    start
}

/// Name of the first member of a zip file, out of its own header: there even where the file is cut short.
fn first_member(start: &[u8]) -> String {
    let Some(length) = start.get(26..28) else { return String::new() };
    let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
    let name = start.get(30..).unwrap_or_default();
    String::from_utf8_lossy(&name[..length.min(name.len())]).into_owned()
}

/// Whether a zip file is what `torch.save` writes.
fn pickled(path: &Path, start: &[u8]) -> bool {
    let is = |name: &str| name == "data.pkl" || name.ends_with("/data.pkl");
    is(&first_member(start)) || npz::members(path).is_some_and(|names| names.iter().any(|name| is(name)))
}

/// Protocols 2 to 5 name themselves at the start; torch's files before the zip ones begin with a pickled number.
fn is_pickle(start: &[u8]) -> bool {
    matches!(start, [0x80, 2..=5, b'}' | b']' | b'(' | b'c' | 0x8a | 0x95, ..])
}

/// A message whose first field is the version of the format, and whose second is one of those of a model.
fn is_onnx(start: &[u8]) -> bool {
    matches!(start, [0x08, 1..=64, 0x12 | 0x1A | 0x22 | 0x28 | 0x32 | 0x3A | 0x42 | 0x72, ..])
}

fn pickle(path: &Path) -> String {
    let shown = path.display().to_string();
    let from = shown.replace('\\', "\\\\").replace('\'', "\\'");
    let mut to = Path::new(&from).with_extension("safetensors").display().to_string();
    if to == from {
        to = Path::new(&from).with_extension("converted.safetensors").display().to_string();
    }
    format!(
        "is a Python pickle (torch.save), which can run any program when it is read; convert it to safetensors once, in \
         Python with torch and safetensors:\n\
         \x20   import torch\n\
         \x20   from safetensors.torch import save_file\n\
         \x20   saved = torch.load('{from}', map_location='cpu', weights_only=True)\n\
         \x20   saved = saved.get('model', saved.get('state_dict', saved))\n\
         \x20   save_file({{k: v.clone() for k, v in saved.items() if torch.is_tensor(v)}}, '{to}')"
    )
}
