//! The one error type of the crate: what a person did wrong, or what failed.

use std::fmt::Display;
use std::io;
use std::path::Path;

/// An error as a person reads it: one sentence that names the file, key or shape, says what was
/// expected, and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bad input or configuration; the process exits with 2.
    #[error("{0}")]
    Usage(String),
    /// Something that was valid could not be carried out; the process exits with 1.
    #[error("{0}")]
    Failure(String),
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Bad input or configuration.
    pub fn usage(message: impl Display) -> Self {
        Self::Usage(message.to_string())
    }

    /// A failure at run time.
    pub fn failure(message: impl Display) -> Self {
        Self::Failure(message.to_string())
    }

    /// `path: cause`, for an input file that cannot be read or understood.
    pub fn file(path: &Path, cause: impl Display) -> Self {
        Self::Usage(format!("{}: {cause}", path.display()))
    }

    /// `path: cause`, for an output that cannot be written.
    pub fn write(path: &Path, cause: impl Display) -> Self {
        Self::Failure(format!("cannot write {}: {cause}", path.display()))
    }

    /// What the system said when `path` was written: a full disk or a place that may not be
    /// written is for a person to mend, anything else is a failure.
    pub fn io(path: &Path, cause: io::Error) -> Self {
        use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        match cause.kind() {
            StorageFull | QuotaExceeded => Self::Usage(format!(
                "cannot write {}: the disk is full ({cause}); free some space or choose another folder",
                path.display()
            )),
            PermissionDenied | ReadOnlyFilesystem => Self::Usage(format!(
                "cannot write {}: {cause}; choose another folder or change its permissions",
                path.display()
            )),
            _ => Self::write(path, cause),
        }
    }

    /// Exit code of the process: 2 for usage and configuration, 1 for failures.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Usage(_) => 2,
            Self::Failure(_) => 1,
        }
    }
}
