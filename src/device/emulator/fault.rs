//! What went wrong in a launch.

use std::ffi::CStr;
use std::fmt;

use super::machine::FaultRecord;

/// Why a launch did not end well. Its text is one sentence: the kernel, the thread and the line where they
/// are known, and what happened there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Name of the kernel.
    pub kernel: String,
    /// Block and thread at which it was noticed; `None` for a deadlock or a launch that never began.
    pub place: Option<([u32; 3], u32)>,
    /// Source file and line.
    pub site: Option<(String, u32)>,
    /// What happened.
    pub what: String,
}

impl Fault {
    /// A launch that is refused.
    pub(super) fn refused(kernel: &str, what: impl fmt::Display) -> Self {
        Self { kernel: kernel.to_owned(), place: None, site: None, what: what.to_string() }
    }

    pub(super) fn from_record(kernel: &str, record: &FaultRecord) -> Self {
        // SAFETY: C++ ends the text within the array; a file is null or a string literal.
        let (what, file) = unsafe {
            let file = record.site.file;
            (CStr::from_ptr(record.what.as_ptr()), (!file.is_null()).then(|| CStr::from_ptr(file)))
        };
        let block = [record.block.x, record.block.y, record.block.z];
        Self {
            kernel: kernel.to_owned(),
            place: (record.in_thread != 0).then_some((block, record.thread)),
            site: file.map(|file| (without_detours(&file.to_string_lossy()), record.site.line)),
            what: without_detours(&what.to_string_lossy()),
        }
    }
}

impl Fault {
    /// The same with more of what happened, if any.
    pub(super) fn and(mut self, more: &str) -> Self {
        if !more.is_empty() {
            self.what = format!("{}; {more}", self.what);
        }
        self
    }
}

/// `kernels/gemm/../common/tile.cuh`, as an include makes it, is `kernels/common/tile.cuh`.
fn without_detours(text: &str) -> String {
    let mut text = text.to_owned();
    while let Some(at) = text.find("/../") {
        let folder = text[..at].rfind(['/', ' ', '(']).map_or(0, |before| before + 1);
        text.replace_range(folder..at + "/../".len(), "");
    }
    text
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {}", self.kernel)?;
        if let Some(([x, y, z], thread)) = self.place {
            write!(f, ", block ({x}, {y}, {z}), thread {thread}")?;
        }
        if let Some((file, line)) = &self.site {
            write!(f, ", {file}:{line}")?;
        }
        write!(f, ": {}", self.what)
    }
}

impl std::error::Error for Fault {}
