//! `manifest.json`: what lies in a folder of exported kernels.

use serde::{Deserialize, Serialize};

/// The one form that this version reads and writes.
pub(super) const FORMAT: u32 = 1;

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Manifest {
    pub format: u32,
    /// Version of the program that exported them.
    pub trencadis: String,
    /// Hash of the kernels' sources, see [`SOURCES`](super::SOURCES).
    pub sources: String,
    /// Version of nvcc.
    pub compiler: String,
    pub architectures: Vec<String>,
    pub fatbins: Vec<Entry>,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Entry {
    /// Name without the ending `.fatbin`.
    pub stem: String,
    pub bytes: u64,
    /// FNV-1a of the contents, in hexadecimal.
    pub hash: String,
    pub kernels: Vec<String>,
}
