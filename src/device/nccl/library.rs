//! Finding NCCL, each failure one sentence. It is looked for when it is first needed, and never unloaded.
//!
//! The declarations are those of `nccl.h`, which has kept them since 2.18. cudarc has bindings too, but looks for
//! `libnccl.so`, where packages install `libnccl.so.2`, and panics where a symbol is missing.

use std::env;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

use crate::{Error, Result};

/// Variable that names the library; otherwise the system looks for it by name.
const PATH: &str = "TRENCADIS_NCCL";
/// As packages install it, and as its developers do.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// What all functions are in, bf16, and GPUs since Hopper.
const OLDEST: Version = Version(2, 18, 0);
const INSTALL: &str = "install NCCL 2.18 or newer, or set TRENCADIS_NCCL to the path of its library";

/// Major, minor and patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// From the number that NCCL tells, in which the minor version has had two digits since 2.9.
    fn from_code(code: c_int) -> Self {
        let code = code.unsigned_abs();
        let unit = if code < 10_000 { 1000 } else { 10_000 };
        Self(code / unit, code % unit / 100, code % 100)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// `ncclComm_t`.
pub(super) type Comm = *mut c_void;
/// `cudaStream_t`.
type CudaStream = *mut c_void;
/// `ncclResult_t`.
pub(super) type Outcome = c_int;

/// `ncclSuccess`.
pub(super) const SUCCESS: Outcome = 0;
/// `ncclInProgress`.
pub(super) const IN_PROGRESS: Outcome = 7;
/// `ncclSum`.
pub(super) const SUM: c_int = 0;

/// `ncclUniqueId`: what the ranks of one communicator find one another by.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` as of 2.18; what has come since keeps its defaults.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cluster: c_int,
    least_blocks: c_int,
    most_blocks: c_int,
    network: *const c_char,
    share_split: c_int,
}

impl Config {
    /// `NCCL_CONFIG_UNDEF_INT`.
    const DEFAULT: c_int = c_int::MIN;

    /// Defaults, but for the thread blocks that an operation may take.
    pub fn new(most_blocks: Option<u32>) -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21800,
            blocking: Self::DEFAULT,
            cluster: Self::DEFAULT,
            least_blocks: Self::DEFAULT,
            most_blocks: most_blocks.map_or(Self::DEFAULT, |most| most as c_int),
            network: ptr::null(),
            share_split: Self::DEFAULT,
        }
    }
}

macro_rules! functions {
    ($($field:ident: $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are used.
        pub(super) struct Functions {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            /// # Safety
            /// `library` is an NCCL, and is never unloaded.
            unsafe fn load(library: &Library) -> std::result::Result<Self, &'static str> {
                $(
                    // SAFETY: the type is that of the declaration in nccl.h.
                    let $field = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol) };
                    let $field = *$field.map_err(|_| $symbol)?;
                )*
                Ok(Self { $($field,)* })
            }
        }
    };
}

functions! {
    get_version: "ncclGetVersion" (*mut c_int) -> Outcome;
    get_unique_id: "ncclGetUniqueId" (*mut UniqueId) -> Outcome;
    comm_init_rank: "ncclCommInitRankConfig" (*mut Comm, c_int, UniqueId, c_int, *mut Config) -> Outcome;
    comm_destroy: "ncclCommDestroy" (Comm) -> Outcome;
    comm_abort: "ncclCommAbort" (Comm) -> Outcome;
    comm_get_async_error: "ncclCommGetAsyncError" (Comm, *mut Outcome) -> Outcome;
    get_error_string: "ncclGetErrorString" (Outcome) -> *const c_char;
    get_last_error: "ncclGetLastError" (Comm) -> *const c_char;
    all_gather: "ncclAllGather" (*const c_void, *mut c_void, usize, c_int, Comm, CudaStream) -> Outcome;
    reduce_scatter: "ncclReduceScatter"
        (*const c_void, *mut c_void, usize, c_int, c_int, Comm, CudaStream) -> Outcome;
    all_reduce: "ncclAllReduce" (*const c_void, *mut c_void, usize, c_int, c_int, Comm, CudaStream) -> Outcome;
    broadcast: "ncclBroadcast" (*const c_void, *mut c_void, usize, c_int, c_int, Comm, CudaStream) -> Outcome;
    send: "ncclSend" (*const c_void, usize, c_int, c_int, Comm, CudaStream) -> Outcome;
    receive: "ncclRecv" (*mut c_void, usize, c_int, c_int, Comm, CudaStream) -> Outcome;
    group_start: "ncclGroupStart" () -> Outcome;
    group_end: "ncclGroupEnd" () -> Outcome;
}

/// NCCL, loaded.
pub struct Nccl {
    pub(super) functions: Functions,
    version: Version,
}

impl Nccl {
    /// Finds and loads NCCL, once a process.
    ///
    /// # Errors
    /// One sentence: it is not there, is too old, or is something else.
    pub fn open() -> Result<&'static Self> {
        static LOADED: OnceLock<std::result::Result<Nccl, String>> = OnceLock::new();
        LOADED.get_or_init(load).as_ref().map_err(Error::usage)
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// An identifier for one communicator, to be told to all its ranks.
    ///
    /// # Errors
    /// What NCCL says, such as that no network is there.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: writes the identifier.
        let outcome = unsafe { (self.functions.get_unique_id)(&raw mut id) };
        self.check(outcome, ptr::null_mut(), "make an identifier")?;
        Ok(id)
    }

    /// `outcome` as an error after what was attempted, with what NCCL has to say about it.
    pub(super) fn check(&self, outcome: Outcome, comm: Comm, what: &str) -> Result<()> {
        if outcome == SUCCESS {
            return Ok(());
        }
        let text = |text: *const c_char| {
            // SAFETY: null or a C string of the library.
            let text = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy());
            text.map(|text| text.trim().to_owned()).unwrap_or_default()
        };
        // SAFETY: takes any number; and a communicator, or null.
        let (meaning, last) = unsafe {
            (text((self.functions.get_error_string)(outcome)), text((self.functions.get_last_error)(comm)))
        };
        let last = if last.is_empty() { last } else { format!("; {last}") };
        Err(Error::failure(format!("NCCL cannot {what}: {meaning} ({outcome}){last}")))
    }
}

fn load() -> std::result::Result<Nccl, String> {
    let (library, name) = match env::var_os(PATH).filter(|path| !path.is_empty()) {
        // SAFETY: loading runs the initialisers of the library that the user has named.
        Some(path) => match unsafe { Library::new(&path) } {
            Ok(library) => (library, path.to_string_lossy().into_owned()),
            Err(error) => {
                return Err(format!(
                    "TRENCADIS_NCCL is {path:?}, which cannot be opened ({error}); name the library of NCCL, such as \
                     /usr/lib/libnccl.so.2"
                ));
            }
        },
        None => {
            // SAFETY: loading runs the initialisers of NCCL.
            let mut found =
                NAMES.iter().filter_map(|name| Some((unsafe { Library::new(*name) }.ok()?, *name)));
            let (library, name) = found
                .next()
                .ok_or(format!("NCCL was not found (libnccl.so.2 cannot be opened); {INSTALL}"))?;
            (library, name.to_owned())
        }
    };
    // Threads of NCCL may run until the process ends.
    let library: &'static Library = Box::leak(Box::new(library));
    // SAFETY: a library under the name of NCCL, which stays.
    let functions = unsafe { Functions::load(library) }
        .map_err(|symbol| format!("{name} is no NCCL of 2.18 or newer: it has no {symbol}; {INSTALL}"))?;
    let mut code = 0;
    // SAFETY: writes the version.
    let outcome = unsafe { (functions.get_version)(&raw mut code) };
    let version = Version::from_code(code);
    if outcome != SUCCESS || version < OLDEST {
        return Err(format!("{name} is NCCL {version}, which is too old; {INSTALL}"));
    }
    Ok(Nccl { functions, version })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_they_were_written_then() {
        for (code, version) in
            [(2708, Version(2, 7, 8)), (21805, Version(2, 18, 5)), (23007, Version(2, 30, 7))]
        {
            assert_eq!(Version::from_code(code), version);
        }
        assert!(Version(2, 8, 4) < OLDEST && OLDEST <= Version(2, 18, 1));
        assert_eq!(Version(2, 30, 7).to_string(), "2.30.7");
    }
}
