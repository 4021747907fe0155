//! Compiled kernels: those in this build, or those of a folder that another build has exported.

mod architecture;
mod folder;
mod manifest;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

mod embedded {
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
}

/// The variable that names a folder of exported kernels, used instead of those in the build.
pub const VARIABLE: &str = "TRENCADIS_KERNELS";

/// Hash of everything that the kernels are compiled from. Kernels of other sources are refused, since
/// their parameters may mean something else.
pub const SOURCES: &str = embedded::SOURCES;

/// A fatbin for each source of the registry.
#[derive(Clone, Debug)]
pub struct Fatbins {
    /// The folder they come from; none for those in this build.
    folder: Option<PathBuf>,
    compiler: String,
    architectures: Vec<String>,
    fatbins: Vec<Fatbin>,
}

#[derive(Clone, Debug)]
struct Fatbin {
    stem: String,
    bytes: Cow<'static, [u8]>,
}

impl Fatbins {
    /// The kernels to use: those of the folder that `TRENCADIS_KERNELS` names, else those in this build.
    ///
    /// # Errors
    /// No kernels in this build, or a folder that is damaged or of another version.
    pub fn find() -> Result<Self> {
        match std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            Some(folder) => Self::load(Path::new(&folder)),
            None => Self::embedded(),
        }
    }

    /// The kernels in this build.
    ///
    /// # Errors
    /// It has none.
    pub fn embedded() -> Result<Self> {
        let (Some(fatbins), Some(compiler)) = (embedded::FATBINS, embedded::COMPILER) else {
            return Err(Error::usage(format!(
                "this build has no kernels, because it was made without nvcc; run tools/install-cuda and build again, or \
                 let {VARIABLE} name a folder that `trencadis kernels --export` has written elsewhere"
            )));
        };
        Ok(Self {
            folder: None,
            compiler: compiler.into(),
            architectures: embedded::ARCHITECTURES.iter().map(|a| a.to_string()).collect(),
            fatbins: fatbins
                .iter()
                .map(|(stem, bytes)| Fatbin { stem: stem.to_string(), bytes: Cow::Borrowed(bytes) })
                .collect(),
        })
    }

    /// Where they come from, as said to a person.
    pub fn origin(&self) -> String {
        self.folder.as_ref().map_or_else(|| "this build".into(), |folder| folder.display().to_string())
    }

    /// Version of nvcc that compiled them.
    pub fn compiler(&self) -> &str {
        &self.compiler
    }

    /// What they are compiled for, such as `sm_80` (machine code) and `compute_80` (PTX).
    pub fn architectures(&self) -> &[String] {
        &self.architectures
    }

    /// Which of the [`architectures`](Self::architectures) a GPU of this compute capability runs: machine
    /// code where there is some, else PTX, which the driver compiles; none where it can run neither.
    pub fn code_for(&self, capability: (u32, u32)) -> Option<&str> {
        architecture::best(&self.architectures, capability)
    }

    /// How many fatbins there are.
    pub fn len(&self) -> usize {
        self.fatbins.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.fatbins.is_empty()
    }

    /// Size of all fatbins in bytes.
    pub fn bytes_in_all(&self) -> usize {
        self.fatbins.iter().map(|fatbin| fatbin.bytes.len()).sum()
    }

    pub(super) fn position(&self, stem: &str) -> Option<usize> {
        self.fatbins.iter().position(|fatbin| fatbin.stem == stem)
    }

    pub(super) fn stem(&self, index: usize) -> &str {
        &self.fatbins[index].stem
    }

    pub(super) fn bytes(&self, index: usize) -> &[u8] {
        &self.fatbins[index].bytes
    }
}
