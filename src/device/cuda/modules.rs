//! Compiled kernels on a GPU: each file is loaded when one of its kernels is first launched.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute as Attribute, CUmodule};

use super::context::Context;
use super::driver::failed;
use crate::device::fatbins::Fatbins;
use crate::kernels::registry;
use crate::{Error, Result};

/// The kernels of a set of fatbins, in one context.
pub(super) struct Modules {
    pub(super) context: Arc<Context>,
    fatbins: Fatbins,
    /// Shared memory that a block can opt into.
    shared_limit: u32,
    kernels: HashMap<String, Entry>,
    /// By source, in the order of `fatbins`.
    modules: Mutex<Vec<Option<Module>>>,
}

struct Entry {
    source: usize,
    threads: u32,
    function: OnceLock<Function>,
}

/// A loaded kernel.
pub(super) struct Function {
    pub(super) raw: CUfunction,
    pub(super) threads: u32,
    /// Size of the parameter struct.
    pub(super) params_bytes: usize,
    /// Dynamic shared memory that it can be given.
    pub(super) shared_limit: u32,
    /// Whether the driver has been told that it takes more than the 48 KiB that every kernel may.
    pub(super) opted_in: AtomicBool,
    /// Whether it waits for the launch before it: code made for less than compute capability 9.0, be it
    /// translated from PTX for a newer GPU, has no instruction for that.
    pub(super) waits: bool,
}

/// Compute capability, as the driver counts, since which a kernel can wait for another.
const WAITS_SINCE: i32 = 90;

struct Module(CUmodule);

// SAFETY: modules and functions of the driver may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Modules {
    pub(super) fn new(context: Arc<Context>, fatbins: Fatbins, shared_limit: u32) -> Self {
        let mut kernels = HashMap::new();
        for source in registry::sources() {
            let Some(index) = fatbins.position(source.stem()) else { continue };
            for kernel in source.kernels {
                let entry = Entry { source: index, threads: kernel.threads, function: OnceLock::new() };
                kernels.insert(kernel.name, entry);
            }
        }
        let modules = Mutex::new((0..fatbins.len()).map(|_| None).collect());
        Self { context, fatbins, shared_limit, kernels, modules }
    }

    /// The kernel of this name, loaded.
    pub(super) fn function(&self, name: &str) -> Result<&Function> {
        let entry = self.kernels.get(name).ok_or_else(|| {
            Error::failure(format!(
                "the kernel {name} is not among the kernels of {}; build it from the same version as the program",
                self.fatbins.origin()
            ))
        })?;
        if let Some(function) = entry.function.get() {
            return Ok(function);
        }
        let function = self.load(name, entry)?;
        Ok(entry.function.get_or_init(|| function))
    }

    fn load(&self, name: &str, entry: &Entry) -> Result<Function> {
        self.context.bind()?;
        let stem = self.fatbins.stem(entry.source);
        let module = self.module(entry.source, stem)?;
        let symbol =
            CString::new(name).map_err(|_| Error::failure(format!("{name} is no name of a kernel")))?;
        let cannot = |what: &str| format!("the kernel {name} of {stem}.fatbin {what}");
        // SAFETY: the module stays loaded as long as `self`; every pointer goes to a local.
        unsafe {
            let raw =
                result::module::get_function(module, symbol).map_err(failed(cannot("cannot be found")))?;
            let (mut offset, mut params_bytes) = (0, 0);
            sys::cuFuncGetParamInfo(raw, 0, &raw mut offset, &raw mut params_bytes)
                .result()
                .map_err(failed(cannot("does not tell its parameters")))?;
            let fixed =
                result::function::get_function_attribute(raw, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
                    .map_err(failed(cannot("does not tell its shared memory")))?;
            let made_for =
                result::function::get_function_attribute(raw, Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)
                    .map_err(failed(cannot("does not tell what it was made for")))?;
            Ok(Function {
                raw,
                threads: entry.threads,
                params_bytes,
                shared_limit: self.shared_limit.saturating_sub(fixed.max(0) as u32),
                opted_in: AtomicBool::new(false),
                waits: made_for >= WAITS_SINCE,
            })
        }
    }

    fn module(&self, source: usize, stem: &str) -> Result<CUmodule> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = &mut modules[source];
        if let Some(module) = slot {
            return Ok(module.0);
        }
        let image = self.fatbins.bytes(source);
        // SAFETY: a whole fatbin, made by the build or checked against its manifest.
        let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) }
            .map_err(failed(format_args!("{stem}.fatbin of {} cannot be loaded", self.fatbins.origin())))?;
        *slot = Some(Module(module));
        Ok(module)
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        let modules = self.modules.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.context.within(|| {
            for module in modules.drain(..).flatten() {
                // SAFETY: loaded once, in `module`, and its functions end with `self`.
                let _ = unsafe { result::module::unload(module.0) };
            }
        });
    }
}
